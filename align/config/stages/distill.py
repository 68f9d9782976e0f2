"""Settings of the stage ``distill``: a teacher's distribution over the next token. Torch-free."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import stage_input
from align.config.stages.lint import LintSettings
from align.config.stages.training import TrainingFields, checked_options
from align.store.artifacts import GENERATORS, Kind


class DistillConfig(TrainingFields):
    """The loss is the divergence of teacher and student, in nats per token of the answers."""

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is the student."""
    teacher: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is the teacher: same tokens, same chat template, usually more layers."""
    data: stage_input(Kind.INSTRUCTIONS, Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the conversations: the answer is ``completion``, or ``chosen``."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """``forward``, KL(teacher || student), covers all the teacher may say; ``reverse`` keeps to what it says most;
    ``jsd`` lies between."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """For ``jsd``: the teacher's share of the mixture; near 0 it is like ``forward``, near 1 like ``reverse``."""
    temperature: float = Field(1.0, gt=0, le=10)
    """Both models' logits are divided by it; higher shows more of what the teacher thinks less likely."""
    top_k: int | None = Field(64, ge=1, le=4096)
    """Tokens of the teacher that are told apart, all others counting as one; computed once and kept in the store's
    cache, 8 bytes each. null compares whole distributions, with the teacher in memory at every step."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the data's answers' own loss per token beside the divergence."""
    on_policy: float = Field(0.0, ge=0, le=1)
    """Share of the steps that learn from answers sampled by the student at that step, which needs teacher and engine in
    memory; corrects mistakes that the data's answers never make."""
    max_tokens: int = Field(64, ge=1)
    """Tokens of a sampled answer at most."""
    sample_temperature: float = Field(1.0, gt=0, le=5)
    """Of sampling the student's answers."""
    lint: LintSettings = LintSettings()
    """What of the look at the rows' tokens, before the first step, is waived (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        return checked_options(
            "sft", options, {"packing", "padding_free", "assistant_only_loss", "completion_only_loss", "loss_type"}
        )

    @model_validator(mode="after")
    def _student_and_teacher_can_be_run(self) -> Self:
        if self.model == self.teacher:
            raise ValueError(f"teacher is '{self.teacher}', the student itself: there is nothing to learn from it.")
        if self.on_policy and self.tuning.input_only:
            raise ValueError(
                f"on_policy samples from the student as it learns, and `tuning: {self.tuning.method}` acts on its "
                "input, which the engines take from a finished checkpoint only. Take on_policy 0, or another tuning."
            )
        if self.on_policy and self.max_tokens >= self.max_length:
            raise ValueError(f"max_tokens {self.max_tokens} leaves no room for a prompt in max_length.")
        return self
