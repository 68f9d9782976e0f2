"""Pools of prompts by difficulty, from which the prompts of the next update are chosen (``select``).

A prompt is easy, hard or in between by the mean score of its last group. Prompts without a score count as in between
and come first. An update gets the shares of easy and hard prompts that the config asks for; all others are in between.
If a pool has too few prompts, the others fill up, hard ones before easy ones.

The choice depends on the seed, the update and the scores so far. The scores are part of the checkpoint, so a resumed
run chooses the same prompts. Every process sees all scores and chooses alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from align.config.stages.policy_gradient import SelectConfig
from align.config.stages.rl import RolloutFields

Pool = Literal["easy", "hard", "between"]
ROUNDING = 1e-6
"""Scores are float32: 0.9 of a group is not at least the 0.9 of a config."""


class PromptPools:
    """The scores of a run's prompts, by their indices."""

    def __init__(self, count: int, config: SelectConfig) -> None:
        self.count = count
        self.config = config
        self.scores: dict[int, float] = {}
        """Prompt -> mean score of its last group."""
        self.visits: dict[int, int] = {}
        """Prompt -> number of groups that answered it."""
        self._chosen: list[int] = []

    def pool_of(self, prompt: int) -> Pool:
        """Return the pool of a prompt."""
        score = self.scores.get(prompt)
        if score is not None and score >= self.config.easy - ROUNDING:
            return "easy"
        if score is not None and score <= self.config.hard + ROUNDING:
            return "hard"
        return "between"

    def choose(self, numbers: range, generator: torch.Generator) -> list[int]:
        """Return the prompts of an update; ``numbers`` are their places in the run.

        A choice of more prompts than there are repeats all of them.
        """
        # 1. Shuffle, then sort by visits: the prompts of a pool take turns, in another order each time.
        order = torch.randperm(self.count, generator=generator).tolist()
        order.sort(key=lambda prompt: self.visits.get(prompt, 0))
        pools: dict[Pool, list[int]] = {"easy": [], "hard": [], "between": []}
        for prompt in order:
            pools[self.pool_of(prompt)].append(prompt)
        # 2. Take each pool's share.
        easy = pools["easy"][: _share(self.config.easy_share, numbers)]
        hard = pools["hard"][: _share(self.config.hard_share, numbers)]
        chosen = [*easy, *hard]
        # 3. Fill up with prompts in between, then with prompts of the pools that are too large.
        rest = [*pools["between"], *pools["hard"][len(hard) :], *pools["easy"][len(easy) :]]
        chosen += rest[: len(numbers) - len(chosen)]
        while len(chosen) < len(numbers):
            chosen += order[: len(numbers) - len(chosen)]
        self._chosen = chosen
        return chosen

    def observe(self, groups: Sequence[int], scores: torch.Tensor) -> None:
        """Note the scores (B,) of responses to the last choice; ``groups`` are their places in it."""
        sums = dict.fromkeys(range(len(self._chosen)), 0.0)
        sizes = dict.fromkeys(sums, 0)
        for group, score in zip(groups, scores.tolist(), strict=True):
            sums[group] += score
            sizes[group] += 1
        for group, prompt in enumerate(self._chosen):
            if not sizes[group]:
                continue
            self.scores[prompt] = sums[group] / sizes[group]
            self.visits[prompt] = self.visits.get(prompt, 0) + 1

    def shares(self) -> dict[str, float]:
        """Return the shares of all prompts that are in the easy and in the hard pool, and that have no score yet."""
        pools = [self.pool_of(prompt) for prompt in self.scores]
        return {
            "easy_prompts": pools.count("easy") / self.count,
            "hard_prompts": pools.count("hard") / self.count,
            "new_prompts": 1 - len(self.scores) / self.count,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the scores and visits for a checkpoint."""
        return {"scores": list(self.scores.items()), "visits": list(self.visits.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.scores = {int(prompt): float(score) for prompt, score in state["scores"]}
        self.visits = {int(prompt): int(count) for prompt, count in state["visits"]}


def make_pools(config: RolloutFields, count: int) -> PromptPools | None:
    """Return the pools that ``select`` asks for, None without it."""
    select = getattr(config, "select", None)
    return None if select is None else PromptPools(count, select)


def _share(share: float, numbers: range) -> int:
    """Return the prompts of an update that are a share of all: rounded so that the shares of many updates are exact."""
    return math.floor(share * numbers.stop + 1e-9) - math.floor(share * numbers.start + 1e-9)


def learned_advantages(advantages: torch.Tensor, bounds: tuple[float, float] | None) -> torch.Tensor:
    """Return True where an advantage (B, T) is to be learned: its absolute value is within ``bounds``."""
    if bounds is None:
        return torch.ones_like(advantages, dtype=torch.bool)
    low, high = bounds
    size = advantages.abs()
    return (size >= low) & (size <= high)
