"""Settings of every stage on preferences. Torch-free."""

from __future__ import annotations

import importlib.metadata
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import stage_input
from align.config.field_dumps import UnreadableClass, class_options
from align.config.stages.lint import LintSettings
from align.config.stages.training import TrainingFields
from align.config.trl_options import OWNED
from align.store.artifacts import GENERATORS


class PreferenceFields(TrainingFields):
    """Fields of every stage on preferences."""

    policy: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained; usually the SFT stage."""
    lint: LintSettings = LintSettings()
    """Lint of the rows' tokens before the first step: findings to accept (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})

    @property
    def sides(self) -> int:
        """A pair has two sequences."""
        return 2


class ReferenceFields(PreferenceFields):
    """Fields of the stages that compare the policy with a reference."""

    refers: ClassVar[bool] = True
    owned_options: ClassVar[dict[str, str]] = OWNED | dict.fromkeys(
        ("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model"),
        "the reference is always scored once, before training",
    )

    reference: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint is the reference; by default the policy before training. It scores every row once."""
    beta: float = Field(0.1, gt=0)
    """Penalty per nat of drift from the reference; smaller values drift further. For ``ipo`` it is the paper's tau."""
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule from beta to ``final_beta`` over the steps."""
    final_beta: float | None = Field(None, gt=0)
    """beta of the last step, also used for the final evaluation; only with a schedule."""

    @model_validator(mode="after")
    def _a_schedule_has_an_end(self) -> Self:
        if (self.beta_schedule == "constant") != (self.final_beta is None):
            raise ValueError(
                f"beta_schedule is {self.beta_schedule} and final_beta {self.final_beta}: a schedule needs the beta "
                "it ends at, and a constant beta has none. Set both, as in `beta_schedule: linear, final_beta: 0.02`, "
                "or neither."
            )
        return self


class ExperimentalFields(PreferenceFields):
    """Fields of the stages whose trainer is experimental in trl, which may move or drop it."""

    owned_options: ClassVar[dict[str, str]] = OWNED | {
        **dict.fromkeys(
            ("max_completion_length", "is_encoder_decoder", "padding_value"),
            "rows are tokenized before training",
        ),
        "generate_during_eval": "the 'evaluate' stage samples",
    }

    @model_validator(mode="after")
    def _trl_has_the_trainer(self) -> Self:
        try:
            class_options(self.trainer_class)
        except UnreadableClass as error:
            raise ValueError(f"the class of its options, {self.trainer_class}, cannot be read: {error}") from None
        except LookupError:
            module, _, name = self.trainer_class.partition(":")
            package = module.partition(".")[0]
            raise ValueError(
                f"{package} {importlib.metadata.version(package)} has no {name} ({module.replace('.', '/')}.py), which "
                "is experimental there and which this stage needs. Install trl 1.16, or take stage 'dpo'."
            ) from None
        return self
