"""Settings of the supervised stages: sft, pretrain and distill. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import stage_input
from align.config.chat_template import ThinkingBudget, check_thinking_budget
from align.config.options import OWNED
from align.config.own_function import OwnFunction, own_or
from align.config.stages.lint import LintSettings
from align.config.stages.stored_rollouts import StoredRollouts
from align.config.stages.teacher import TeacherConfig, check_teachers
from align.config.stages.training import TrainingFields
from align.store.artifacts import GENERATORS, Kind
from align.store.fingerprint import canonical

SAMPLING = ("max_tokens", "sample_temperature", "thinking_budget", "rollouts")
"""Fields of ``distill`` that are about sampled answers."""


class SftConfig(TrainingFields):
    """Trains on ``completion`` of instructions, or ``chosen`` of preferences.

    Rows of similar length share a batch. With ``packing``, ``batch_size`` counts packs of ``max_length`` tokens.
    """

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained; it needs a chat template."""
    data: stage_input(Kind.INSTRUCTIONS, Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the answers: the ``train`` split is trained on, the ``test`` split only evaluated."""
    supervise: Literal["last", "all"] = "last"
    """Turns to train on. ``last``: the answer of a row, and all turns of an episode. ``all``: also every assistant turn
    of the prompt. Their positions are found by rendering the conversation up to each turn, with any chat template."""
    thoughts: Literal["train", "read", "drop"] = "train"
    """Thoughts of answers (``<think>``): learn them, show but do not learn them, or remove them (docs/thinking.md)."""
    packing: bool = False
    """Pack short rows into rows of ``max_length`` tokens, without attention between them (best fit decreasing)."""
    padding_free: bool = False
    """Concatenate a micro-batch's rows instead of padding them; ``packing`` always does."""
    loss: own_or(Literal["nll"]) = "nll"  # type: ignore[valid-type]
    """``nll``: the answers' negative log-likelihood per token. Or an own function of
    ``align.methods.records.AnswerTokens``: ``"my_methods:weighted_tokens"``, or ``{function: ..., OPTION: ...}``
    (docs/own_methods.md). Held-out losses stay ``nll``."""
    neftune: float | None = Field(None, gt=0, le=100)
    """Noise on the embeddings in training, NEFTune's alpha (2310.05914); 5 is usual."""
    lint: LintSettings = LintSettings()
    """Lint of the rows' tokens before the first step: findings to accept (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})
    keyed_when_set: ClassVar[frozenset[str]] = TrainingFields.keyed_when_set | {"loss"}
    trainer_class: ClassVar[str] = "trl.trainer.sft_config:SFTConfig"
    owned_options: ClassVar[dict[str, str]] = OWNED | {
        "neftune_noise_alpha": "set 'neftune' next to 'trainer'",
        "assistant_only_loss": "set 'supervise: all' next to 'trainer'",
        "completion_only_loss": "answers alone are ever learned; a 'pretrain' stage learns whole texts",
        "eval_packing": "held-out rows are scored one by one",
        "packing_strategy": "packs are filled with whole rows, best fit decreasing",
    }

    def identities(self, base: Path) -> dict[str, str]:
        """Return the identity of an own loss, for the stage's key."""
        return {"loss": self.loss.identity("loss")} if isinstance(self.loss, OwnFunction) else {}

    @model_validator(mode="after")
    def _check_loss(self) -> SftConfig:
        other = {"loss_type", "label_smoothing_factor"} & set(self.trainer)
        if isinstance(self.loss, OwnFunction) and other:
            raise ValueError(f"trainer.{min(other)} is another loss than the own function; remove one of them.")
        return self

    @model_validator(mode="after")
    def _check_packing(self) -> SftConfig:
        if self.tuning.input_only and (self.packing or self.padding_free):
            raise ValueError(
                f"{'packing' if self.packing else 'padding_free'} concatenates rows, and tuning "
                f"{self.tuning.method} changes the beginning of each; turn one of them off."
            )
        return self


class PretrainConfig(TrainingFields):
    """Loss on every token of every text. ``batch_size`` counts packs of ``max_length`` tokens.

    Texts are packed: windows of documents share a row of ``max_length`` tokens, without attention between them. To keep
    what the model knew, mix in general texts with the recipe's ``mix`` step, train few weights (``tuning``) or keep the
    model near its start (``anchor``).
    """

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained."""
    data: stage_input(Kind.TEXTS)  # type: ignore[valid-type]
    """Stage with the texts: the ``train`` split is trained on, the ``test`` split only evaluated."""
    document_end: str | None = Field(None, min_length=1)
    """Token after every document, by default the tokenizer's EOS. A chat model's EOS ends a turn, so name the token of
    its pre-training (``<|endoftext|>``); otherwise it learns that texts end like turns."""

    trainer_class: ClassVar[str] = "trl.trainer.sft_config:SFTConfig"
    owned_options: ClassVar[dict[str, str]] = OWNED | {
        **dict.fromkeys(("packing", "padding_free"), "texts are always packed"),
        **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), "every token of a text is learned"),
    }

    @model_validator(mode="after")
    def _check_tuning_reads_packs(self) -> PretrainConfig:
        if self.tuning.input_only:
            raise ValueError(
                f"tuning: {self.tuning.method} changes a row's beginning, and packed texts share rows; take full, lora "
                "or another method that changes modules."
            )
        return self


class DistillConfig(TrainingFields):
    """The loss is the divergence between teacher and student, in nats per token of the answers."""

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is the student."""
    teacher: stage_input(*GENERATORS) | TeacherConfig | list[TeacherConfig]  # type: ignore[valid-type]
    """Stage whose checkpoint is the teacher: same tokenizer and chat template, usually a larger model. Or a block, for
    a server, a privileged prompt or another tokenizer. Or a list of blocks, chosen by ``teacher_column``."""
    teacher_column: str | None = Field(None, min_length=1)
    """Column of the rows whose value chooses the teacher by its ``match``: ``source``, or a column that the recipe
    keeps."""
    data: stage_input(Kind.INSTRUCTIONS, Kind.PREFERENCES)  # type: ignore[valid-type]
    """Stage with the conversations: the answer is ``completion``, or ``chosen``."""
    thoughts: Literal["train", "read", "drop"] = "train"
    """Thoughts of answers (``<think>``): learn them, show but do not learn them, or remove them (docs/thinking.md)."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """``forward`` is KL(teacher || student), which covers all modes of the teacher; ``reverse`` seeks its main modes;
    ``jsd`` is in between."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share of ``jsd``'s mixture; near 0 like ``forward``, near 1 like ``reverse``."""
    temperature: float = Field(1.0, gt=0, le=10)
    """Divisor of both models' logits; higher values give more weight to the teacher's less likely tokens."""
    top_k: int | None = Field(64, ge=1, le=4096)
    """Most likely tokens of the teacher to compare; all others count as one. They are computed once and cached in the
    store, 8 bytes each. null compares full distributions, with the teacher in memory at every step."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of an SFT loss on the data's answers, in addition to the divergence."""
    on_policy: float = Field(0.0, ge=0, le=1)
    """Share of the steps that train on answers sampled by the student at that step. It corrects the student's own
    mistakes, and needs the engine in memory, and each teacher that is no endpoint."""
    max_tokens: int = Field(64, ge=1)
    """Most tokens of a sampled answer."""
    sample_temperature: float = Field(1.0, gt=0, le=5)
    """Temperature of the student's answers."""
    thinking_budget: ThinkingBudget = None
    """Tokens after which a thought of a sampled answer is closed by force; null for no limit. Forced tokens are not
    learned (docs/thinking.md)."""
    rollouts: StoredRollouts = StoredRollouts()
    """Parquet files of the sampled answers: ``{keep: 1.0, max_gb: 2}`` (docs/rollouts.md)."""
    lint: LintSettings = LintSettings()
    """Lint of the rows' tokens before the first step: findings to accept (docs/lint.md)."""

    identified: ClassVar[frozenset[str]] = frozenset({"lint"})
    keyed_when_set: ClassVar[frozenset[str]] = TrainingFields.keyed_when_set | {"teacher_column", "thinking_budget"}
    trainer_class: ClassVar[str] = "trl.trainer.sft_config:SFTConfig"
    owned_options: ClassVar[dict[str, str]] = OWNED | {
        **dict.fromkeys(("packing", "padding_free"), "distillation pads its rows"),
        **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), "answers alone are ever learned"),
        "loss_type": "set 'divergence' next to 'trainer'",
    }

    @model_validator(mode="after")
    def _check_student_and_teacher(self) -> Self:
        if any(self.model in (self.teacher, block.stage) and block.system is None for block in self.teachers):
            raise ValueError(
                f"teacher is '{self.model}', the student itself; name another stage, or give it a privileged prompt: "
                "`teacher: {self: true, system: ...}`."
            )
        if not isinstance(self.teacher, str):
            check_teachers(self.teachers, self.teacher_column, self.top_k, self.temperature)
        elif self.teacher_column is not None:
            raise ValueError("teacher_column chooses among a list of teachers, and teacher names one stage; remove it.")
        if self.on_policy and self.tuning.input_only:
            raise ValueError(
                f"on_policy samples from the student during training, and `tuning: {self.tuning.method}` changes its "
                "input, which engines support only from a finished checkpoint. Take on_policy 0, or another tuning."
            )
        # Prompt and sampled answer together become a row of training.
        if self.on_policy and self.max_tokens >= self.max_length:
            raise ValueError(f"max_tokens {self.max_tokens} leaves no room for a prompt in max_length.")
        return self

    @property
    def teachers(self) -> list[TeacherConfig]:
        """The teachers as blocks."""
        if isinstance(self.teacher, str):
            return [TeacherConfig(stage=self.teacher)]
        return [self.teacher] if isinstance(self.teacher, TeacherConfig) else self.teacher

    def fields_outside_key(self) -> set[str]:
        """Return the fields whose text the stage's key omits; blocks of teachers are in ``identities``."""
        return {*self.identified, "long_rows", "rollouts"} | (set() if isinstance(self.teacher, str) else {"teacher"})

    def identities(self, base: Path) -> dict[str, str]:
        """Return the identities of teachers that are blocks. Rates and retries of their servers do not change them."""
        if isinstance(self.teacher, str):
            return {}
        return {"teacher": canonical([block.identity() for block in self.teachers])}

    @model_validator(mode="after")
    def _check_unused_settings(self) -> Self:
        if self.divergence != "jsd" and self.changed("jsd_beta"):
            raise ValueError(f"jsd_beta has no effect with divergence {self.divergence}; take jsd.")
        unused = [] if self.on_policy else self.changed(*SAMPLING)
        if unused:
            raise ValueError(
                f"{unused[0]} is about sampled answers, and on_policy is 0; raise it, or remove {unused[0]}."
            )
        check_thinking_budget(self.thinking_budget, self.max_tokens, "max_tokens")
        if self.thinking_budget is not None and any(teacher.tokens == "aligned" for teacher in self.teachers):
            raise ValueError(
                "thinking_budget leaves out forced tokens in the middle of an answer, and `tokens: aligned` compares "
                "whole answers; remove one of them."
            )
        return self
