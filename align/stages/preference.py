"""What the stages that learn from preferences do alike: their fields, rows and reference. Torch-free at import.

``dpo``, ``kto``, ``orpo``, ``cpo`` and ``simpo`` train a policy on answers that are better or worse; each says in its
own module by which loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.config.stages.preference import PreferenceFields, ReferenceFields
from align.config.tuning import TuningBase
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact
from align.training.beta import beta_at

if TYPE_CHECKING:
    from align.lint.linter import StageKind
    from align.lint.trainer import Split
    from align.training.reference import Answer, ReferenceCache, Sums
    from align.training.rows import Encoded, Row

ADAPTER_FIELDS = {"rank", "alpha", "dropout", "targets", "last_layers", "rslora", "dora", "init", "save_modules"}
"""Fields of ``qlora`` that say nothing of the quantized weights, unless the start is partly in the adapters."""


def beta_of(config: ReferenceFields, steps: int) -> Callable[[int], float]:
    """Return beta as a function of the number of optimizer steps done, out of ``steps``."""
    return lambda step: beta_at(step, steps, config.beta, config.final_beta, config.beta_schedule)


@dataclass
class Ready:
    """A policy as it is loaded, and its rows, encoded and linted. ``collator`` is the trainer's."""

    tokenizer: Any
    model: Any
    splits: Mapping[str, Encoded]
    collator: Any
    _shown: Mapping[str, Split]
    _wrapped: Any = None

    @property
    def train(self) -> Encoded:
        """What is learned."""
        return self.splits["train"]

    def lint(self, context: StageContext, stage: StageKind) -> None:
        """Look at the rows as the trainer will see them, before anything expensive."""
        from align.lint.trainer import lint_stage

        lint_stage(context, stage, _Seen(self), self._shown, context.config.max_length)

    def wrapped(self, context: StageContext) -> Any:
        """The model made ready to be trained by the stage's tuning; the same one whenever it is asked for."""
        from align.models.tuning.apply import apply_tuning

        if self._wrapped is None:
            shown = [
                [*row["prompt_ids"], *row.get("chosen_ids", row.get("completion_ids", []))] for row in self.train.rows
            ]
            self._wrapped = apply_tuning(
                self.model, context.config.tuning, context.seed, tokenizer=self.tokenizer, warn=context.warn, rows=shown
            )
        return self._wrapped


class _Seen:
    """What ``lint_stage`` reads of a trainer: the rows are looked at before there is one."""

    def __init__(self, ready: Ready) -> None:
        self.processing_class, self.model = ready.tokenizer, ready.model
        self.train_dataset, self.data_collator = ready.train.rows, ready.collator


def make_ready(
    context: StageContext,
    encode: Callable[[Any, Sequence[Row], int], Encoded],
    collator: Callable[..., Any],
    rows_of: Callable[[Sequence[Row]], Sequence[Row]] = lambda rows: rows,
) -> Ready:
    """Load the policy and encode its rows; ``rows_of`` turns rows as stored into rows as trained on.

    Raises ``UserError`` for a model without chat template or data without usable rows.
    """
    from align.lint.trainer import Split
    from align.models.loading import load_tokenizer
    from align.models.tuning.apply import load_for_tuning
    from align.training.input_checks import check_encoded, check_model
    from align.training.rows import read_splits
    from align.training.trainers import label_positions_only

    config: PreferenceFields = context.config
    source = context.artifact("policy").model
    tokenizer, model = load_tokenizer(source, config.tuning), load_for_tuning(source, config.tuning)
    check_model(context.name, model, tokenizer)
    label_positions_only()
    shown, splits = {}, {}
    for split, stored in read_splits(context).items():
        rows = rows_of(stored)
        encoded = splits[split] = encode(tokenizer, rows, config.max_length)
        check_encoded(context.name, encoded, len(rows), split, config.max_length, context.warn)
        shown[split] = Split(rows, encoded)
    return Ready(tokenizer, model, splits, collator(pad_token_id=tokenizer.pad_token_id), shown)


class Reference:
    """The stage's reference: the policy before its first step, or the checkpoint of another stage, loaded if needed."""

    def __init__(self, context: StageContext, ready: Ready) -> None:
        from align.training.reference import ReferenceCache

        self.context, self.ready = context, ready
        self.named: Artifact | None = context.inputs.get("reference")
        if self.named is not None:
            _check_reference(context, ready.tokenizer, self.named)
        self._loaded: Any = None
        shared = None if context.cache is None else context.cache / "reference_logprobs"
        identity = _identity(context, self.named)
        self.cache: ReferenceCache = ReferenceCache(context.checkpoints, shared, identity, context.warn)

    def sums(self, split: str, answers: Sequence[Answer]) -> Sums:
        """Log-probabilities of a split's answers, from the cache where they are in it."""
        return self.cache.sums(split, answers, self._compute)

    def facts(self) -> dict[str, int]:
        """Metrics: how many answers the reference had to score, and how many were found scored."""
        return {"reference_computed": self.cache.computed, "reference_cached": self.cache.found}

    def _compute(self, answers: Sequence[Answer]) -> Sums:
        from align.models.threads import device_of
        from align.models.tuning.apply import initial_policy
        from align.training.reference import answer_sums

        config = self.context.config
        if self._loaded is None:
            self._loaded = self.ready.wrapped(self.context) if self.named is None else self._load(self.named)
        device = device_of(self.context.runtime)
        if next(self._loaded.parameters()).device.type != device.type:
            self._loaded.to(device)
        with initial_policy(self._loaded) as start:
            return answer_sums(
                start,
                answers,
                self.ready.tokenizer.pad_token_id,
                config.precision == "bfloat16",
                lambda done, total: self.context.progress(done, total, unit="reference answers"),
            )

    def _load(self, artifact: Artifact) -> Any:
        """Another checkpoint, as the policy's is before its first step."""
        from align.models.tuning.apply import apply_tuning, load_for_tuning

        tuning: TuningBase = self.context.config.tuning
        model = load_for_tuning(artifact.model, tuning)
        return apply_tuning(model, tuning, self.context.seed) if tuning.completes_weights else model


def _identity(context: StageContext, named: Artifact | None) -> dict[str, str]:
    """All that decides a reference's numbers but the rows; ``named`` is the checkpoint that is not the policy's."""
    from align.models.threads import device_of

    tuning: TuningBase = context.config.tuning
    loaded = "float32"
    if tuning.completes_weights or (tuning.starts_from_weights and named is None):
        loaded = f"{tuning.model_dump_json()} {context.seed}"
    elif tuning.method == "qlora":  # scored as it is trained: all but the adapter's own fields decides its weights
        loaded = tuning.model_dump_json(exclude=ADAPTER_FIELDS)
    return {
        "weights": (named or context.artifact("policy")).weights,
        "loaded": loaded,
        "precision": context.config.precision,
        "device": device_of(context.runtime).type,
    }


def _check_reference(context: StageContext, tokenizer: Any, artifact: Artifact) -> None:
    """A reference reads the policy's tokens: ``UserError`` for another vocabulary, a warning for another template."""
    from align.models.loading import load_tokenizer
    from align.training.input_checks import check_same_vocabulary

    other = load_tokenizer(artifact.model, context.config.tuning)
    names = (f"policy '{context.artifact('policy').stage}'", f"reference '{artifact.stage}'")
    check_same_vocabulary(context.name, tokenizer, other, names)
    if tokenizer.chat_template != other.chat_template:
        context.warn(
            f"{context.name}: {names[0]} and {names[1]} have different chat templates; the reference is shown the "
            "policy's, which it was not trained on."
        )


def train_without_reference(
    context: StageContext, make: Callable[..., Any], arguments: type[Any], **options: Any
) -> dict[str, Any]:
    """Train on pairs by a loss that needs no reference, save ``model/``, and return the stage's metrics.

    ``make`` is the trainer, ``arguments`` its arguments' class, ``options`` what of these is the loss's own.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from align.training.arguments import training_arguments
    from align.training.cpo_trainer import held_out
    from align.training.fit import fit
    from align.training.rows import counts, encode_pairs
    from align.training.saving import save

    ready = make_ready(context, encode_pairs, DataCollatorForPreference)
    ready.lint(context, "dpo")
    trainer = make(
        model=ready.wrapped(context),
        args=training_arguments(
            arguments,
            context,
            len(ready.train.rows),
            **options,
            max_length=context.config.max_length,  # read by what tokenizes, which has nothing to do
            remove_unused_columns=False,
        ),
        data_collator=ready.collator,
        train_dataset=ready.train.rows,
        processing_class=ready.tokenizer,
    )
    trainer.row_lengths = ready.train.lengths
    metrics = fit(trainer, context, lambda split: held_out(trainer, ready.splits[split]))
    save(context, trainer, ready.tokenizer)
    return {**metrics, "pairs": len(ready.train.rows), **counts(ready.splits, "pairs")}
