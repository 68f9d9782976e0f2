"""Shared work of the stages on preferences: policy, rows and reference.

``dpo``, ``kto`` and the stages of ``reference_free.py`` use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.config.stages.preference import PreferenceFields, ReferenceFields
from align.config.tuning import TuningBase
from align.lint.trainer import Split, lint_stage
from align.models.compute.processes import device_of
from align.models.loading import load_tokenizer
from align.models.tuning.apply import apply_tuning, initial_policy, load_for_tuning
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact
from align.training.arguments import shares_prefixes
from align.training.fused_head import use_blockwise_head
from align.training.input_checks import check_encoded, check_same_vocabulary, load_model
from align.training.preference_trainers import beta_at
from align.training.reference import Answer, ReferenceCache, Sums, answer_sums
from align.training.rows import Encoded, Row, read_splits
from align.training.sft_trainer import LintedRows
from align.training.thoughts import check_thoughts, own_template, use_training_template
from align.training.trainers import reduce_work

ADAPTER_FIELDS = {
    "rank",
    "alpha",
    "dropout",
    "targets",
    "last_layers",
    "rslora",
    "dora",
    "init",
    "save_modules",
    "base_dtype",
}
"""Fields of ``qlora`` that do not affect the quantized weights, unless the adapters start from the weights."""


def beta_of(config: ReferenceFields, steps: int) -> Callable[[int], float]:
    """Return beta as a function of the number of optimizer steps done, of ``steps`` in total."""
    return lambda step: beta_at(step, steps, config.beta, config.final_beta, config.beta_schedule)


@dataclass
class PreparedPolicy:
    """A loaded policy with its encoded rows, and the trainer's collator."""

    context: StageContext
    tokenizer: Any
    model: Any
    splits: Mapping[str, Encoded]
    collator: Any
    _linted: Mapping[str, Split]
    """Splits as the linter reads them."""

    @property
    def train(self) -> Encoded:
        """The rows to train on."""
        return self.splits["train"]

    def lint(self) -> None:
        """Lint the rows as the trainer will see them, before anything expensive."""
        view = LintedRows(self.train.rows, self.collator, self.tokenizer, self.model)
        lint_stage(self.context, view, self._linted)

    @functools.cached_property
    def tuned_model(self) -> Any:
        """The model with the stage's tuning applied, once and late: EVA and LoftQ look at rows or weights."""
        sequences = [
            [*row["prompt_ids"], *row.get("chosen_ids", row.get("completion_ids", []))] for row in self.train.rows
        ]
        tuning = self.context.config.tuning
        seed = self.context.seed
        model = apply_tuning(self.model, tuning, seed, tokenizer=self.tokenizer, rows=sequences)
        _reduce_work(self.context, model)
        return model


def prepare_policy(
    context: StageContext,
    encode: Callable[[Any, Sequence[Row], int], Encoded],
    collator: Callable[..., Any],
    rows_of: Callable[[Sequence[Row]], Sequence[Row]] = lambda rows: rows,
) -> PreparedPolicy:
    """Load the policy and encode its rows; ``rows_of`` converts stored rows into rows to train on.

    Raises ``UserError`` for a model without chat template or data without usable rows.
    """
    config: PreferenceFields = context.config
    tokenizer, model = load_model(context, "policy")
    use_blockwise_head()
    linted = {}
    splits = {}
    for split, stored in read_splits(context).items():
        rows = rows_of(stored)
        check_thoughts(context.name, tokenizer, rows)
        if split == "train":
            use_training_template(tokenizer, rows)
        encoded = splits[split] = encode(tokenizer, rows, config.max_length)
        check_encoded(context, encoded, len(rows), split)
        linted[split] = Split(rows, encoded)
    return PreparedPolicy(context, tokenizer, model, splits, collator(pad_token_id=tokenizer.pad_token_id), linted)


class Reference:
    """The stage's reference: the policy before its first step, or another stage's checkpoint, loaded if needed."""

    def __init__(self, context: StageContext, prepared: PreparedPolicy) -> None:
        self.context = context
        self.prepared = prepared
        self.checkpoint: Artifact | None = context.inputs.get("reference")
        if self.checkpoint is not None:
            # Check before any computation, because another vocabulary would make every log-probability meaningless.
            _check_reference(context, prepared.tokenizer, self.checkpoint)
        self._loaded: Any = None
        shared = None if context.cache is None else context.cache / "reference_logprobs"
        identity = _identity(context, self.checkpoint)
        self.cache: ReferenceCache = ReferenceCache(context.checkpoints, shared, identity, context.warn)

    def sums(self, split: str, answers: Sequence[Answer]) -> Sums:
        """Return the log-probabilities of a split's answers (nats), from the cache if they are there."""
        return self.cache.sums(split, answers, self._compute)

    def facts(self) -> dict[str, int]:
        """Return the numbers of answers that the reference scored and that came from the cache."""
        return {"reference_computed": self.cache.computed, "reference_cached": self.cache.hits}

    def _compute(self, answers: Sequence[Answer]) -> Sums:
        if self._loaded is None:
            self._loaded = self.prepared.tuned_model if self.checkpoint is None else self._load(self.checkpoint)
        device = device_of(self.context.runtime)
        # Move the model only now, because with every answer in the cache the reference never needs the device.
        if next(self._loaded.parameters()).device.type != device.type:
            self._loaded.to(device)
        # Report before the first batch, so the progress bar appears immediately and the events include its duration.
        if answers:
            self.context.progress(0, len(answers), unit="reference answers")
        # Adapters off, or their initial values: the policy as it was before its first step.
        with initial_policy(self._loaded) as start:
            return answer_sums(
                start,
                answers,
                self.prepared.tokenizer.pad_token_id,
                self.context.precision == "bfloat16",
                lambda done, total: self.context.progress(done, total, unit="reference answers"),
            )

    def _load(self, artifact: Artifact) -> Any:
        """Load another stage's checkpoint like the policy before its first step."""
        tuning: TuningBase = self.context.config.tuning
        model = load_for_tuning(artifact.model, tuning, self.context.precision)
        # LoftQ's adapters start as the quantization error, so the reference needs them as well.
        if tuning.completes_weights:
            model = apply_tuning(model, tuning, self.context.seed)
        _reduce_work(self.context, model)
        return model


def _reduce_work(context: StageContext, model: Any) -> None:
    """Let the policy, or its reference, compute as the trainer will."""
    bfloat16 = context.precision == "bfloat16"
    reduce_work(model, bfloat16=bfloat16, shared_prefixes=shares_prefixes(context))


def _identity(context: StageContext, checkpoint: Artifact | None) -> dict[str, str]:
    """Return everything but the rows that affects a reference's log-probabilities, for the cache's key.

    ``checkpoint`` is the reference's checkpoint if it is not the policy's.
    """
    tuning: TuningBase = context.config.tuning
    loaded: str = tuning.base_type(context.precision)
    # Tuning changes the reference only if it changes frozen weights: by quantization, or by its initialization.
    if tuning.completes_weights or (tuning.starts_from_weights and checkpoint is None):
        loaded = f"{tuning.model_dump_json()} {context.seed}"
    elif tuning.method == "qlora":  # the reference is quantized like the policy; the adapter's fields do not matter
        loaded = tuning.model_dump_json(exclude=ADAPTER_FIELDS)
    return {
        "weights": (checkpoint or context.artifact("policy")).weights,
        "loaded": loaded,
        "precision": context.precision,
        "device": device_of(context.runtime).type,
        "shared_prefixes": str(shares_prefixes(context)),
    }


def _check_reference(context: StageContext, tokenizer: Any, artifact: Artifact) -> None:
    """Raise ``UserError`` if the reference has another vocabulary; warn if it has another chat template."""
    reference_tokenizer = load_tokenizer(artifact.model, context.config.tuning)
    names = (f"policy '{context.artifact('policy').stage}'", f"reference '{artifact.stage}'")
    check_same_vocabulary(context.name, tokenizer, reference_tokenizer, names)
    if own_template(tokenizer) != reference_tokenizer.chat_template:
        context.warn(
            f"{context.name}: {names[0]} and {names[1]} have different chat templates; the reference is shown the "
            "policy's, which it was not trained on."
        )
