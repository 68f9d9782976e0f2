"""Stage ``distill``: train a student on a teacher's distributions, cached or computed, and on its own answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig as Arguments

from align.errors import UserError
from align.inference.engine import open_engine
from align.inference.protocol import RolloutEngine, Sampling
from align.lint.trainer import Split, lint_stage
from align.models.checkpoints.sharding import full_model
from align.models.compute.processes import broadcast, device_of, use_threads
from align.models.loading import load_policy, load_tokenizer
from align.models.tuning.apply import apply_tuning, engine_source
from align.models.tuning.peft_layers import merged_weights
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact
from align.training.arguments import shares_prefixes, training_arguments
from align.training.distill_trainer import (
    AnswerCollator,
    PreparedDistill,
    Teacher,
    TeacherCache,
    held_out,
    is_on_policy_step,
)
from align.training.divergence import Measure, TopTokens
from align.training.fit import fit
from align.training.input_checks import check_ends, check_same_vocabulary, encode_splits, load_model
from align.training.rows import Encoded, counts, encode_supervised, read_splits
from align.training.save import save
from align.training.thoughts import check_thoughts, thought_facts
from align.training.trainers import reduce_work

if TYPE_CHECKING:
    from align.config.stages.sft import DistillConfig


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return steps, tokens, speed, and held-out divergence and loss before and after.

    Raises ``UserError`` for a teacher with other tokens or another template, and as ``sft`` does.
    """
    use_threads(context.runtime)
    config: DistillConfig = context.config
    tokenizer, model = load_model(context)
    teacher = context.artifact("teacher")
    _check_teacher(context, tokenizer, teacher)
    stored = read_splits(context)
    check_thoughts(context.name, tokenizer, stored["train"])
    splits = encode_splits(context, stored, lambda rows, _: encode_supervised(tokenizer, rows, config.max_length))
    for encoded in splits.values():
        for number, row in enumerate(encoded.rows):
            # Batches are shuffled; the number leads from a row back to the teacher's distribution for it.
            row["row"] = number  # type: ignore[assignment]
    train_rows = splits["train"]
    check_ends(context.name, train_rows, tokenizer)
    targets = _TeacherTargets(context, tokenizer, teacher, splits, model.get_output_embeddings().weight.shape[0])
    sequences = [row["input_ids"] for row in train_rows.rows]
    model = apply_tuning(model, config.tuning, context.seed, tokenizer=tokenizer, rows=sequences)
    trainer = PreparedDistill(
        model=model,
        args=training_arguments(Arguments, context, len(train_rows.rows)),
        train_dataset=Dataset.from_list(train_rows.rows),
        processing_class=tokenizer,
        data_collator=targets.collator,
    )
    trainer.row_lengths = train_rows.lengths
    linted = {name: Split(stored[name], splits[name]) for name in splits}
    lint_stage(context, trainer, linted)
    # After the linter, since the teacher's passes are the expensive part.
    targets.prepare()
    trainer.measure, trainer.teacher, trainer.top_tokens = targets.measure, targets.teacher, targets.top_tokens["train"]
    trainer.sft_weight, trainer.on_policy = config.sft_weight, config.on_policy
    engine = _engine(context) if config.on_policy else None
    try:
        if engine is not None:
            trainer.sampler = _sampler(context, engine)
        metrics = fit(trainer, context, lambda split: held_out(trainer, splits[split], targets.top_tokens[split]))
    finally:
        if engine is not None:
            engine.close()
    save(context, trainer, tokenizer)
    facts = {"rows": len(train_rows.rows), **counts(splits, "rows"), **targets.facts()}
    facts |= thought_facts(tokenizer, train_rows)
    if engine is not None:
        # The steps follow from the seed, so the count includes the steps of earlier attempts.
        on_policy_steps = (
            is_on_policy_step(trainer.args.seed, step, config.on_policy) for step in range(metrics["steps"])
        )
        facts |= {"own_steps": sum(on_policy_steps), "engine": engine.name}
    return {**metrics, **facts}


def _check_teacher(context: StageContext, tokenizer: Any, teacher: Artifact) -> None:
    teacher_tokenizer = load_tokenizer(teacher.model)
    check_same_vocabulary(context.name, tokenizer, teacher_tokenizer, ("the student", "the teacher"))
    if tokenizer.chat_template != teacher_tokenizer.chat_template:
        raise UserError(
            f"{context.name}: student and teacher have different chat templates, so the teacher would read what it was "
            "never trained on. Give both `model` stages one chat_template."
        )


class _TeacherTargets:
    """The teacher's distributions for both splits, and the teacher itself if training still needs it."""

    def __init__(
        self, context: StageContext, tokenizer: Any, artifact: Artifact, splits: dict[str, Encoded], vocabulary: int
    ) -> None:
        config: DistillConfig = context.config
        self.context, self.artifact, self.splits, self.vocabulary = context, artifact, splits, vocabulary
        self.measure = Measure(config.divergence, config.jsd_beta, config.temperature, config.top_k)
        self.collator = AnswerCollator(tokenizer.pad_token_id)
        self.top_tokens: dict[str, list[TopTokens]] = {name: [] for name in splits}
        self.teacher: Teacher | None = None
        identity = {
            "teacher": artifact.weights,
            "precision": context.precision,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "vocabulary": vocabulary,
            "shared_prefixes": shares_prefixes(context),
        }
        # Without a shared cache, at least a resumed attempt finds them.
        folder = (context.cache or context.checkpoints) / "teachers"
        self.cache = TeacherCache(folder, identity, context.warn)

    def prepare(self) -> None:
        """Load the teacher's distributions from the cache or compute them; load the teacher only if it is needed."""
        if self.measure.top_k is not None:
            for name, split in self.splits.items():
                self.top_tokens[name] = self.cache.load(split.rows, lambda split=split: self._compute(split))  # type: ignore[misc]
        # With ``top_k`` the distributions are small enough to store, and the teacher can leave memory before training.
        trains_with_teacher = self.measure.top_k is None or self.context.config.on_policy > 0
        self.teacher = self._load() if trains_with_teacher else None

    def _compute(self, split: Encoded) -> list[TopTokens]:
        def report(done: int, total: int) -> None:
            self.context.progress(done, total, unit="teacher rows")

        return self._load().find_top_tokens(split.rows, self.collator, self.measure, self.vocabulary, report)

    def _load(self) -> Teacher:
        if self.teacher is None:
            low = self.context.precision == "bfloat16"
            model = load_policy(self.artifact.model, torch.bfloat16 if low else torch.float32)
            model.to(device_of(self.context.runtime)).requires_grad_(False)
            # The teacher computes as the student does, so equal weights give equal distributions.
            reduce_work(model, bfloat16=low, shared_prefixes=shares_prefixes(self.context))
            self.teacher = Teacher(model, low)
        return self.teacher

    def facts(self) -> dict[str, Any]:
        """Return the numbers of rows that came from the cache and that the teacher computed."""
        return {"teacher_rows_cached": self.cache.hits, "teacher_rows_computed": self.cache.computed}


def _engine(context: StageContext) -> RolloutEngine:
    config: DistillConfig = context.config
    return open_engine(
        broadcast(
            lambda: engine_source(
                context.artifact("model").model, config.tuning, context.checkpoints / "engine" / "model"
            )
        ),
        context.runtime,
        precision=context.precision,
        max_length=config.max_length + config.max_tokens,
        seed=context.seed % 2**32,
        warn=context.warn,
        on_hang=context.fail_at_once,
    )


def _sampler(context: StageContext, engine: RolloutEngine) -> Any:
    config: DistillConfig = context.config

    def sample(model: Any, prompts: list[list[int]], step: int) -> list[list[int]]:
        # On-policy: the engine gets the student's current weights before each of its steps.
        with torch.no_grad(), full_model(model) as student:
            engine.load_weights(merged_weights(student))
        # Each step has its own seed, so a resumed run samples the same answers as an uninterrupted run.
        sampling = Sampling(config.max_tokens, config.sample_temperature, seed=context.seed + (step << 20))
        return [answers[0].token_ids for answers in engine.generate(prompts, sampling)]

    return sample
