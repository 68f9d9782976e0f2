"""Settings of the task ``reward_bench_2``, in which the compared checkpoints are the judges. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from align.config.stages.evaluation.task_fields import RecordFields, SamplingFields, TaskConfig

RankingMode = Literal["ranking", "ratings"]
DATASET = {"dataset": "allenai/reward-bench-2", "split": "test"}


class RewardBench2Config(RecordFields, SamplingFields, TaskConfig):
    """Settings of RewardBench 2 for generative reward models.

    Records: ``id``, ``prompt``, ``chosen`` and ``rejected`` (lists of texts), ``subset``.
    """

    task: Literal["reward_bench_2"] = "reward_bench_2"

    column_names: ClassVar[Sequence[str]] = ("id", "prompt", "chosen", "rejected", "subset")
    mode: RankingMode = "ranking"
    """``ranking`` shows all answers to a prompt at once and asks for the best. ``ratings`` asks for a rating of each
    answer from 1 to 10. The Ties subset, with many answers to a prompt, always has ratings."""
    max_tokens: int = Field(2048, ge=1)
    """Longest verdict in tokens, with its reasons. 2048 is the benchmark's."""

    def hub_defaults(self) -> Mapping[str, str]:
        """Return the benchmark's dataset."""
        return DATASET
