"""Write down what a trainer sampled, measured and learned from: the rows of ``align.store.rollouts``.

The first process writes, because every process has the entire rollout. An update is written before it is learned from,
and so before its checkpoint: a resumed run deletes the rows of the updates that it repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from align.environments.episode import Episode
from align.errors import shorten
from align.evaluation.score_validation.references import reference_of
from align.models.chat.token_texts import TokenTexts
from align.rl.masking import response_mask
from align.rl.objectives import masked_kl
from align.rl.rollout import COMPONENT, STEP_REWARDS, Rollout
from align.store import rollout_writer
from align.store import rollouts as store
from align.store.rollouts import SCHEMA, VALIDATIONS, to_json, to_text
from align.verifiers.verdict import reasons_in

if TYPE_CHECKING:
    from align.rl.arguments import RolloutArguments

MEASURED = {
    "logprobs": "logprobs",
    "ref_logprobs": "ref_logprobs",
    "token_kl": "kl",
    "entropy": "entropy",
    "values": "values",
    "raw_advantages": "raw_advantages",
    "advantages": "advantages",
    "learn_mask": "learn_mask",
}
"""Columns of the responses that are learned from, and their tensors."""


class RolloutRecorder:
    """Writes the rollouts and validations of a run next to its checkpoints, as ``config.rollouts`` says."""

    def __init__(self, args: RolloutArguments, tokenizer: Any, stage: str, notify: Callable[[str], None]) -> None:
        self.config = args.config.rollouts
        settings = {"stage": stage, "keep": self.config.keep, **args.fingerprint()}
        self.files = rollout_writer.RolloutFiles(Path(str(args.output_dir)), self.config.max_bytes, settings, notify)
        self.token_texts = TokenTexts(tokenizer)

    def rewind(self, updates: int) -> None:
        """Delete the rows of the updates after the first ``updates``, which are sampled again."""
        self.files.rewind(updates)

    def write(self, rollout: Rollout) -> None:
        """Write all responses that were sampled for an update, with the measurements of the learned ones."""
        if self.config.keep:
            self.files.write(self._keep(rollout_table(rollout, self.token_texts)))

    def write_validation(self, rollout: Rollout, update: int) -> None:
        """Write the responses to the held-out prompts after ``update`` updates."""
        if self.config.keep:
            self.files.write(self._keep(validation_table(rollout, update, self.token_texts)), VALIDATIONS)

    def _keep(self, table: pa.Table) -> pa.Table:
        if self.config.keep == 1:
            return table
        return table.filter(pa.array(store.is_kept(name, self.config.keep) for name in table["prompt_id"].to_pylist()))


def merge(checkpoints: Path, output: Path, notify: Callable[[str], object]) -> None:
    """Write the rollouts and validations next to the checkpoints as few files into a stage's output."""
    for name in (store.ROLLOUTS, store.VALIDATIONS):
        rollout_writer.merge(checkpoints / name, output / name, notify)


def example(rollout: Rollout) -> str:
    """Return the first response of a rollout with its score, and its row's reference answer if there is one."""
    reference = reference_of(rollout.rows[0])
    score = float(rollout.tensors["scores"][0])
    prefix = "" if reference is None else f"reference {shorten(repr(reference))}, "
    return f"{prefix}response {shorten(repr(rollout.texts[0]))}, score {score:g}."


# ---- tables ----


def rollout_table(rollout: Rollout, token_texts: TokenTexts) -> pa.Table:
    """Return a row for each response that was sampled for ``rollout``, in the order of sampling."""
    parts = rollout.sampled
    tables = [_sampled_columns(part, number, rollout.update + 1, token_texts) for number, part in enumerate(parts)]
    sampled = pa.concat_tables(tables)
    places = rollout.tensors.get("place", torch.arange(len(rollout))).tolist()
    # The place of each sampled response among the learned ones, None for a response that was not selected.
    order: list[int | None] = [None] * len(sampled)
    for learned, place in enumerate(places):
        order[place] = learned
    # Only learned responses were measured. ``take`` moves their values to the rows of the sampled responses, and fills
    # the other rows with null.
    is_complete = order == list(range(len(sampled)))
    for name, array in _measured_columns(rollout).items():
        sampled = _with_column(sampled, name, array if is_complete else array.take(pa.array(order, pa.int32())))
    return _with_column(sampled, "learned", pa.array([place is not None for place in order]))


def validation_table(rollout: Rollout, update: int, token_texts: TokenTexts) -> pa.Table:
    """Return a row for each response to a held-out prompt after ``update`` updates."""
    rollout.tensors["kl"] = masked_kl(rollout)
    table = _sampled_columns(rollout, 0, update, token_texts)
    for name, array in _measured_columns(rollout).items():
        table = _with_column(table, name, array)
    return _with_column(table, "learned", pa.array([False] * len(rollout)))


def _sampled_columns(rollout: Rollout, number: int, update: int, token_texts: TokenTexts) -> pa.Table:
    """Return the columns that follow from sampling and scoring; ``number`` counts the rounds of sampling."""
    tensors = rollout.tensors
    count = len(rollout)
    columns: dict[str, Any] = {
        "update": [update] * count,
        "round": [number] * count,
        "index": range(count),
        "group": rollout.groups,
        **_prompts(rollout),
        "response": list(map(to_text, rollout.texts)),
        "score": tensors["scores"].tolist(),
        **_scores(rollout),
        "tokens": list(map(len, rollout.responses)),
        "finished": tensors["finished"].tolist(),
        "prompt_ids": rollout.prompts,
        "token_ids": rollout.responses,
        "token_texts": [token_texts(ids) for ids in rollout.responses],
    }
    if rollout.explanations:
        columns["explanation"] = [to_json(explanation or None) for explanation in rollout.explanations]
    if "gold" in tensors:
        columns["gold"] = tensors["gold"].tolist()
    if rollout.has_thoughts:
        columns |= {name: tensors[name].tolist() for name in ("thought_tokens", "thought_end", "open_thought")}
    for name in ("response_mask", "weights_update", "sampler_logprobs", "forced", STEP_REWARDS):
        if name in tensors:
            columns[name] = _by_token(rollout, tensors[name], name)
    if rollout.episodes is not None:
        rows = list(map(episode_columns, rollout.episodes))
        columns |= {name: [store.encode_value(name, row[name]) for row in rows] for name in store.EPISODE_COLUMNS}
    # A column without values is null in every row, so all files have one schema.
    arrays = []
    for column in SCHEMA:
        values = columns.get(column.name, [None] * count)
        is_array = isinstance(values, pa.Array)
        arrays.append(values.cast(column.type) if is_array else pa.array(values, column.type))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _measured_columns(rollout: Rollout) -> dict[str, pa.Array]:
    tensors = rollout.tensors
    columns = {"kl": pa.array(tensors["kl"].double().sum(dim=1).tolist(), pa.float32())}
    for column, name in MEASURED.items():
        if name in tensors:
            columns[column] = _by_token(rollout, tensors[name], column)
    return columns


def _by_token(rollout: Rollout, tensor: torch.Tensor, column: str) -> pa.Array:
    """Return rows of a tensor (B, T) or (B, T+1) without their padding, as lists of the column's type."""
    lengths = list(map(len, rollout.responses))
    width = max(lengths)
    values = tensor[:, :width][response_mask(lengths, width)]
    # Arrow stores lists as one flat array and the offsets of the rows, so no list of Python numbers is made.
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    kind = SCHEMA.field(column).type
    elements = pa.array(values.cpu().numpy()).cast(kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), elements).cast(kind)


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), values)


def _prompts(rollout: Rollout) -> dict[str, list[Any]]:
    """Return prompts, their identities and the rows' reference answers; responses of a group share them."""
    columns: dict[str, list[Any]] = {"prompt": [], "prompt_id": [], "reference": []}
    # The responses to a prompt share the row object, so each prompt is encoded once.
    by_row: dict[int, tuple[str | None, str, str | None]] = {}
    for row in rollout.rows:
        if id(row) not in by_row:
            reference = reference_of(row)
            text = None if reference is None else to_text(reference)
            by_row[id(row)] = (to_json(row["prompt"]), store.identify_prompt(row), text)
        for values, value in zip(columns.values(), by_row[id(row)], strict=True):
            values.append(value)
    return columns


def _scores(rollout: Rollout) -> dict[str, list[list[tuple[str, Any]]]]:
    """Return the parts of the scores, and for each part the reason that its reward gave."""
    names = [name for name in rollout.tensors if name.startswith(COMPONENT)]
    values = {name.removeprefix(COMPONENT): rollout.tensors[name].tolist() for name in names}
    scores: list[list[tuple[str, Any]]] = []
    reasons: list[list[tuple[str, Any]]] = []
    for index in range(len(rollout)):
        parts = [(name, numbers[index]) for name, numbers in values.items() if math.isfinite(numbers[index])]
        scores.append(parts)
        reasons.append(list(reasons_in(dict(parts)).items()))
    return {"scores": scores, "reasons": reasons}


def episode_columns(episode: Episode) -> dict[str, Any]:
    """Return the columns of an episode, which a response without an environment lacks."""
    return {
        "messages": episode.messages,
        "calls": [asdict(call) for call in episode.calls],
        "turns": len(episode.turns),
        "turn_scores": episode.turn_scores,
        "stop": episode.stop,
        "failure": episode.failure,
        "episode": _without_columns(episode),
    }


def _without_columns(episode: Episode) -> dict[str, Any]:
    """Return the fields of an episode that no other column has; tokens become their number."""
    content = episode.to_json()
    for name in ("prompt_ids", "messages", "calls", "stop", "failure"):
        del content[name]
    # The columns ``token_ids`` and ``sampler_logprobs`` have the tokens of all turns. With the numbers of tokens
    # ``read_episode`` cuts them apart again.
    for turn in content["turns"]:
        turn["token_ids"] = len(turn["token_ids"])
        del turn["logprobs"]
    content["observations"] = list(map(len, content["observations"]))
    return content


def read_episode(row: dict[str, Any]) -> Episode:
    """Return the episode of a row, as it was played."""
    content = dict(row["episode"])
    ids = row["token_ids"]
    logprobs = row["sampler_logprobs"]
    start = 0
    turns = []
    observations = []
    # Turns and the environment's tokens alternate in the response. The last turn may have no observation behind it.
    for number, turn in enumerate(content["turns"]):
        end = start + turn["token_ids"]
        turns.append(turn | {"token_ids": ids[start:end], "logprobs": logprobs[start:end]})
        start = end
        if number < len(content["observations"]):
            start += content["observations"][number]
            observations.append(ids[end:start])
    columns = {name: row[name] for name in ("prompt_ids", "messages", "calls", "stop", "failure")}
    return Episode.from_json(content | columns | {"turns": turns, "observations": observations})
