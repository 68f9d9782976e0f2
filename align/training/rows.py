"""From rows of messages to token ids, with every cut and every row left out counted.

Done here and not by trl, whose own preparation caches on disk, drops over-long pairs without a word, and supervises
whatever the chat template puts behind the end of the turn. Left out: packing (``packing.py``) and plain texts
(``texts.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.rows import answer_side, is_finished, read_rows
from align.data.splits import hold_back
from align.errors import UserError
from align.models.render import render_answer, render_answered, render_conversation, render_prompt

if TYPE_CHECKING:
    from align.pipeline.context import StageContext

Row = dict[str, Any]
MASKED = -100
"""Label of a token that no loss is taken on; torch's and trl's convention."""
NO_ROOM = "left out, the prompt alone fills max_length"
TOO_LONG = "left out, longer than max_length"
CUT = "answer cut at max_length, so without its end of turn"
SPLIT_UP = "made a row for each answer, since the template rewrites earlier ones"
NOT_TRAINED = "left out, every answer is marked as not to be trained on"
SAME_ANSWERS = "left out, both answers are the same"


class PromptRewritten(UserError):
    """The chat template renders a prompt differently once an answer follows it."""


@dataclass
class Encoded:
    """Token ids of one split.

    ``rows`` are what trl's trainer of the stage takes, ``lengths`` their tokens (the longer side of a pair),
    ``sources`` the rows they came from. ``counts`` says what was cut or left out, in words fit for a warning.
    """

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    sources: list[Row] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, row: dict[str, list[int]], length: int, source: Row) -> None:
        self.rows.append(row)
        self.lengths.append(length)
        self.sources.append(source)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def read_split(path: Path, most: int | None, stage: str) -> list[Row]:
    """The first ``most`` rows of a split; ``UserError`` when it has none."""
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{stage}: {path} has no rows; loosen the filters of its data stage.")
    return rows[:most]


def read_splits(context: StageContext) -> dict[str, list[Row]]:
    """Rows of the stage's ``data``: ``train``, ``test``, and ``validation`` where the config chooses a checkpoint."""
    config, data = context.config, context.artifact("data")
    train = read_split(data.split("train"), None, context.name)
    splits = {}
    if config.chooses:
        train, splits["validation"] = held_back(context, train, config.eval_rows)
    return {
        "train": train[: config.max_rows],
        **splits,
        "test": read_split(data.split("test"), config.eval_rows, context.name),
    }


def counts(splits: Mapping[str, Encoded], what: str) -> dict[str, int]:
    """Metrics: how many rows each held-out split has, as ``test_<what>``."""
    return {f"{name}_{what}": len(split.rows) for name, split in splits.items() if name != "train"}


def held_back(context: StageContext, train: list[Row], most: int) -> tuple[list[Row], list[Row]]:
    """``hold_back`` of a ``train`` split, with a note that says how many rows; ``UserError`` for a single question."""
    learned, validation = hold_back(train, most)
    if not learned:
        raise UserError(
            f"{context.name}: the train split has one question alone, and a checkpoint is chosen by rows that are not "
            "learned from. Give more rows, or take `keep: last` without early_stopping."
        )
    context.note(
        f"{context.name}: {len(validation)} of {len(train)} train rows choose the checkpoint and are not learned from; "
        "the test split has no part in it"
    )
    return learned, validation


def split_turn(
    tokenizer: Any, prompt: list[Row], answer: list[Row], finished: bool = True, tools: str | None = ""
) -> tuple[list[int], list[int]]:
    """Ids of the prompt as it is rendered for sampling, and of the answer up to and with its end-of-turn token.

    Where the tokenizer would join the prompt's last characters and the answer's first, they stay apart, as in sampling.
    ``finished=False`` leaves the end of turn out, for an answer that was cut off. ``tools`` is the row's.

    Raises ``PromptRewritten`` when the chat template renders the prompt differently once an answer follows it: training
    and sampling would then see different contexts.
    """
    prompt_ids = render_prompt(tokenizer, prompt, tools)
    whole = render_conversation(tokenizer, [*prompt, *answer], finished, tools)
    if whole[: len(prompt_ids)] != prompt_ids:
        answer_ids = render_answer(tokenizer, prompt, answer, finished, tools)
        if answer_ids is not None:
            return prompt_ids, answer_ids
        shared = next((at for at, pair in enumerate(zip(prompt_ids, whole, strict=False)) if pair[0] != pair[1]), 0)
        raise PromptRewritten(
            "the chat template renders a prompt differently once an answer follows it: sampling would see "
            f"{tokenizer.decode(prompt_ids[shared:])!r} where training sees {tokenizer.decode(whole[shared:])[:60]!r}. "
            "Give the model a chat template whose generation prompt is the beginning of an assistant turn."
        )
    return prompt_ids, whole[len(prompt_ids) :]


def split_answer(tokenizer: Any, row: Mapping[str, Any], side: str | None = None) -> tuple[list[int], list[int]]:
    """``split_turn`` of a row's prompt and one of its answers: every stage's way from a row to trained tokens.

    ``side`` is the answer's field, by default the one that is learned from. An answer that was cut off has no end.
    """
    side = side or answer_side(row)
    return split_turn(tokenizer, row["prompt"], row[side], is_finished(row, side), row.get("tools"))


def encode_answers(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """As ``encode_supervised``, with labels on every answer of a conversation and not on the last alone.

    A turn with ``train: False`` has none; a row without any other is left out and counted. Where answers are is found
    by rendering the conversation up to each of them, which works with any template. One that writes earlier answers
    differently once others follow (thoughts that it drops) has no one rendering in which each stands as it is sampled:
    such a conversation becomes a row for each of its answers, and is counted.
    """
    out = Encoded()
    for row in rows:
        messages, ended = [*row["prompt"], *row[answer_side(row)]], is_finished(row, answer_side(row))
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        places = [index for index in answers if messages[index].get("train") is not False]
        if not places:
            out.count(NOT_TRAINED)
            continue
        parts = [
            split_turn(tokenizer, messages[:place], [messages[place]], ended or place < answers[-1], row.get("tools"))
            for place in places
        ]
        whole = [*parts[-1][0], *parts[-1][1]]
        if all(whole[: len(before) + len(answer)] == before + answer for before, answer in parts):
            labels = [MASKED] * len(whole)
            for before, answer in parts:
                labels[len(before) : len(before) + len(answer)] = answer
            _add_cut(out, whole, labels, max_length, row)
        else:
            out.count(SPLIT_UP)
            for before, answer in parts:
                _add_cut(out, before + answer, [MASKED] * len(before) + answer, max_length, row)
    return out


def _add_cut(out: Encoded, ids: list[int], labels: list[int], max_length: int, row: Row) -> None:
    """A row of at most ``max_length`` tokens; one that has no label left is left out."""
    if all(label == MASKED for label in labels[:max_length]):
        out.count(NO_ROOM)
        return
    if len(ids) > max_length:
        out.count(CUT)
    out.add({"input_ids": ids[:max_length], "labels": labels[:max_length]}, min(len(ids), max_length), row)


def encode_supervised(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """``input_ids`` and ``labels`` (``MASKED`` on the prompt) for SFT; the answer is ``completion``, else ``chosen``.

    An answer that does not fit is cut at ``max_length`` tokens and loses its end of turn, which one that was cut off
    when it was sampled has not; a prompt that leaves no room for an answer is left out, and so is an answer that is
    marked as not to be trained on (``train: False``).
    """
    out = Encoded()
    for row in rows:
        if row[answer_side(row)][-1].get("train") is False:
            out.count(NOT_TRAINED)
            continue
        prompt_ids, answer_ids = split_answer(tokenizer, row)
        room = max_length - len(prompt_ids)
        if room <= 0:
            out.count(NO_ROOM)
            continue
        if len(answer_ids) > room:
            out.count(CUT)
        ids = prompt_ids + answer_ids[:room]
        out.add({"input_ids": ids, "labels": [MASKED] * len(prompt_ids) + ids[len(prompt_ids) :]}, len(ids), row)
    return out


def encode_pairs(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` (answers only) for DPO.

    A pair with a side longer than ``max_length`` is left out: a cut answer would be judged by its missing end.
    """
    out = Encoded()
    for row in rows:
        (prompt_ids, chosen_ids), (_, rejected_ids) = (
            split_answer(tokenizer, row, side) for side in ("chosen", "rejected")
        )
        if chosen_ids == rejected_ids:
            out.count(SAME_ANSWERS)
            continue
        length = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        if length > max_length:
            out.count(TOO_LONG)
            continue
        out.add({"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}, length, row)
    return out


def encode_conversations(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """``chosen_ids`` and ``rejected_ids`` (prompt and answer, as a reward model reads them); too long ones left out."""
    out = Encoded()
    for row in rows:
        chosen_ids, rejected_ids = (render_answered(tokenizer, row, side) for side in ("chosen", "rejected"))
        if chosen_ids == rejected_ids:
            out.count(SAME_ANSWERS)
            continue
        length = max(len(chosen_ids), len(rejected_ids))
        if length > max_length:
            out.count(TOO_LONG)
            continue
        out.add({"chosen_ids": chosen_ids, "rejected_ids": rejected_ids}, length, row)
    return out
