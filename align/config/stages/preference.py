"""Settings that the stages on preferences share. Torch-free."""

from __future__ import annotations

import importlib.metadata
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import stage_input
from align.config.stages.lint import LintSettings
from align.config.stages.training import TrainingFields, checked_options
from align.config.trl_options import CLASSES, trainer_options
from align.store.artifacts import GENERATORS


class PreferenceFields(TrainingFields):
    """Fields of every such stage."""

    policy: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained; usually the SFT stage."""
    lint: LintSettings = LintSettings()
    """What of the look at the rows' tokens, before the first step, is waived (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})

    @property
    def sides(self) -> int:
        """A pair is two sequences."""
        return 2


class ReferenceFields(PreferenceFields):
    """Fields of those that hold the policy to a reference."""

    refers: ClassVar[bool] = True

    reference: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint the policy is held to; by default the policy as it comes in. It is scored once."""
    beta: float = Field(0.1, gt=0)
    """How much a nat of drift from the reference costs; smaller drifts further. For ``ipo`` it is that paper's tau."""
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How beta moves to ``final_beta`` over the steps: not at all, along a line, or a half cosine."""
    final_beta: float | None = Field(None, gt=0)
    """beta of the last step, which the held-out rows are scored with afterwards; only with a schedule."""

    @model_validator(mode="after")
    def _a_schedule_has_an_end(self) -> Self:
        if (self.beta_schedule == "constant") != (self.final_beta is None):
            raise ValueError(
                f"beta_schedule is {self.beta_schedule} and final_beta {self.final_beta}: a schedule needs the beta "
                "it ends at, and a constant beta has none. Set both, as in `beta_schedule: linear, final_beta: 0.02`, "
                "or neither."
            )
        return self


def check_experimental(kind: str) -> None:
    """``ValueError`` where the installed trl has no trainer for a stage that runs on an experimental one."""
    try:
        trainer_options(kind)
    except (LookupError, OSError):
        package, file, name = CLASSES[kind]
        raise ValueError(
            f"{package} {importlib.metadata.version(package)} has no {name} ({package}/{file}), which is experimental "
            "there and which this stage needs. Install trl 1.16, or take stage 'dpo'."
        ) from None


def checked_experimental_options(kind: str, options: dict[str, Any], own: set[str]) -> dict[str, Any]:
    """``checked_options`` for such a stage: what its trainer tokenizes or generates by is not set at all."""
    check_experimental(kind)
    for name in ("max_completion_length", "is_encoder_decoder", "padding_value"):
        if name in options:
            raise ValueError(f"'{name}' is not set here: rows are tokenized before training.")
    if "generate_during_eval" in options:
        raise ValueError("'generate_during_eval' is not set here: the 'evaluate' stage samples.")
    return checked_options(kind, options, own)
