"""Learn from stored rollouts instead of sampling, so a loss can be examined without an engine.

Prompts, responses, scores and the engine's log-probabilities come from the files. The trainer measures and learns as in
the run that wrote them, so with the same settings its weights are equal bit for bit.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as ds
import torch

from align.config.runtime.launch import rank
from align.config.stages.rl import RolloutFields
from align.errors import UserError
from align.inference.protocol import Response
from align.models.compute.processes import all_gather
from align.rl.arguments import RolloutArguments
from align.rl.masking import pad_rows
from align.rl.prompts import Prompts
from align.rl.refusals import RolloutInputs
from align.rl.rollout import COMPONENT, STEP_REWARDS, Rollout, join_rollouts, rollout_of
from align.rl.rollout_tables import read_episode
from align.rl.sampler import RolloutSampler
from align.store.rollouts import checked_files, read_settings, rollout_dataset, rollout_rows

SHAPES = ("rollout_batch", "samples_per_prompt", "temperature", "thinking_budget")
"""Settings that the stored rollouts and the stage must share."""
COLUMNS = (
    *(
        "update",
        "round",
        "index",
        "group",
        "prompt_id",
        "prompt",
        "reference",
        "response",
        "score",
        "scores",
        "gold",
        "explanation",
    ),
    *("finished", "thought_tokens", "thought_end", "open_thought", "forced"),
    *("prompt_ids", "token_ids", "weights_update", "sampler_logprobs", STEP_REWARDS),
    *("messages", "calls", "turn_scores", "stop", "failure", "episode"),
)
"""Columns that sampling and scoring wrote."""


class ReplayEngine:
    """Takes the place of an engine: its weights are never asked for."""

    name = "replay"

    def load_weights(self, weights: Any) -> None:
        """Ignore the policy's weights."""

    def close(self) -> None:
        """Have no effect."""


class StoredUpdates:
    """The rollouts of a folder, checked against the settings of the stage that learns from them."""

    def __init__(self, folder: Path, config: RolloutFields, place: str) -> None:
        """Check the files. Raises ``UserError``, which begins with ``place``, if the stage cannot learn from them."""
        self.folder = folder
        self.place = place
        files = checked_files(folder)
        if not files:
            raise UserError(
                f"{place}: {folder} has no rollouts. Name a stage that learned from its own samples and stored them."
            )
        self.data: ds.Dataset = rollout_dataset(files)
        self._check_settings(read_settings(folder), config)
        self._check_updates(config)

    def _check_settings(self, settings: dict[str, Any], config: RolloutFields) -> None:
        if settings.get("keep", 1) != 1:
            raise UserError(
                f"{self.place}: {self.folder} has the rollouts of a share of {settings['keep']:g} of the prompts. Run "
                "the stage again with `rollouts: {keep: 1.0}`."
            )
        for name in SHAPES:
            stored = settings.get(name)
            current = getattr(config, name)
            if stored != current:
                raise UserError(
                    f"{self.place}: the rollouts in {self.folder} were sampled with {name} {stored}, and this stage "
                    f"has {current}. Set {name}: {'null' if stored is None else stored}."
                )

    def _check_updates(self, config: RolloutFields) -> None:
        table = self.data.to_table(columns=["update"], filter=pc.field("round") == 0)
        counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(table["update"]).to_pylist()}
        for update in range(1, config.updates + 1):
            if counts.get(update) != config.rollout_batch:
                raise UserError(
                    f"{self.place}: of {config.rollout_batch} responses in update {update}, {self.folder} has "
                    f"{counts.get(update, 0)}, and this stage makes {config.updates} updates. Lower updates if the "
                    "stage ended early, or raise its rollouts.max_gb and run it again."
                )

    def read(self, update: int, sampling_round: int = 0) -> Rollout:
        """Return the scored responses of a round of an update, counted from 0. Raises ``UserError`` if there are none.

        Round 0 has the responses that every method samples, the other rounds replace some of them.
        """
        # The files count updates from 1, as people do.
        row_filter = (pc.field("update") == update + 1) & (pc.field("round") == sampling_round)
        rows = sorted(rollout_rows(self.data, COLUMNS, filter=row_filter), key=lambda row: row["index"])
        if not rows:
            raise UserError(
                f"{self.place}: {self.folder} has no round {sampling_round} of update {update + 1}: the stage that "
                "wrote it sampled less often. Learn with its settings, or with `zero_variance: keep`."
            )
        return _to_rollout(rows, update)


def _to_rollout(rows: list[dict[str, Any]], update: int) -> Rollout:
    # A run has an environment for all responses or for none, so the first row tells.
    has_episodes = rows[0]["episode"] is not None
    rollout = rollout_of(
        [read_episode(row) if has_episodes else _response(row) for row in rows],
        update,
        update,
        rows=[{"id": row["prompt_id"], "prompt": row["prompt"], "answer": row["reference"]} for row in rows],
        groups=[row["group"] for row in rows],
        prompts=[row["prompt_ids"] for row in rows],
    )
    tensors = rollout.tensors
    width = tensors["response_mask"].shape[1]
    # ``rollout_of`` assumed the current weights. A run with max_staleness sampled with older ones, which the files
    # name.
    tensors["weights_update"] = pad_rows([row["weights_update"] for row in rows], width, torch.int64)
    tensors["scores"] = torch.tensor([row["score"] for row in rows])
    for name in dict.fromkeys(name for row in rows for name in row["scores"]):
        tensors[f"{COMPONENT}{name}"] = torch.tensor([row["scores"].get(name, math.nan) for row in rows])
    if rows[0][STEP_REWARDS] is not None:
        tensors[STEP_REWARDS] = pad_rows([row[STEP_REWARDS] for row in rows], width)
    explanations = [row["explanation"] or {} for row in rows]
    if any(explanations):
        rollout.explanations = explanations
    if rows[0]["gold"] is not None:
        tensors["gold"] = torch.tensor([row["gold"] for row in rows])
    return rollout


def _response(row: dict[str, Any]) -> Response:
    return Response(
        token_ids=row["token_ids"],
        logprobs=row["sampler_logprobs"],
        finished=row["finished"],
        text=row["response"],
        thought_tokens=row["thought_tokens"] or 0,
        thought_end=row["thought_end"] or 0,
        is_open=bool(row["open_thought"]),
        forced=[place for place, is_forced in enumerate(row["forced"] or ()) if is_forced],
    )


class ReplaySampler(RolloutSampler):
    """Returns stored rollouts, scores included. The first process reads, and all get the result."""

    def __init__(self, stored: StoredUpdates, prompts: Prompts, args: RolloutArguments) -> None:
        super().__init__(prompts, ReplayEngine(), None, None, args)
        self.stored = stored
        self._round = 0
        """The last round that was read."""

    def replay(self, update: int) -> Rollout:
        """Return the responses of an update, from which the method selects."""
        return self._read(update, 0)

    def sample(self, update: int, indices: list[int], seeds: list[int]) -> Rollout:
        """Return the next round of further responses of an update."""
        return self._read(update, self._round + 1)

    def _read(self, update: int, sampling_round: int) -> Rollout:
        started = time.perf_counter()
        self._round = sampling_round
        local = self.stored.read(update, sampling_round) if rank() == 0 else None
        rollout = join_rollouts([part for part in all_gather(local) if part is not None])
        rollout.tensors["place"] = torch.arange(len(rollout))
        rollout.seconds = {"sampling": time.perf_counter() - started, "scoring": 0.0, "sync": 0.0}
        return rollout


def make_sampler(prompts: Prompts, inputs: RolloutInputs, args: RolloutArguments) -> RolloutSampler:
    """Return the sampler of a trainer: of its engine, or of the stored rollouts that it replays."""
    if inputs.replay is not None:
        return ReplaySampler(StoredUpdates(inputs.replay, args.config, "replay"), prompts, args)
    return RolloutSampler(prompts, inputs.engine, inputs.scorer, inputs.gold, args, episodes=inputs.episodes)
