"""Stage ``distill``: train a student on a teacher's distributions, cached or computed, and on its own answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig as Arguments

from align.errors import UserError
from align.inference.engine import open_engine
from align.inference.protocol import Response, RolloutEngine, Sampling
from align.inference.thoughts import ThoughtReader, generate, require_answer_room
from align.inference.token_scores import ScoringEndpoint
from align.inference.trainer_engine import policy_weights
from align.lint.trainer import Split, lint_stage
from align.models.checkpoints.sharding import full_model
from align.models.compute.processes import broadcast, device_of, use_threads
from align.models.loading import load_policy
from align.models.tuning.apply import apply_tuning, engine_source
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact
from align.training.arguments import shares_prefixes, training_arguments
from align.training.distill_trainer import (
    AnswerCollator,
    PreparedDistill,
    Teacher,
    held_out,
    is_on_policy_step,
)
from align.training.divergence import ABSENT, Measure, TopTokens
from align.training.fit import fit
from align.training.input_checks import check_ends, encode_splits, load_model
from align.training.rows import Encoded, counts, encode_supervised, read_splits
from align.training.sampled_answers import AnswerRecorder
from align.training.save import save
from align.training.served_teacher import EndpointTeacher
from align.training.teachers import AlignedTeacher, Setting, StageTeacher
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
    endpoints = _open_endpoints(context)
    tokenizer, model = load_model(context)
    require_answer_room(config.thinking_budget, tokenizer, config.max_tokens, context.name)
    stored = read_splits(context)
    check_thoughts(context.name, tokenizer, stored["train"])
    splits = encode_splits(context, stored, lambda rows, _: encode_supervised(tokenizer, rows, config.max_length))
    for encoded in splits.values():
        for number, row in enumerate(encoded.rows):
            # Batches are shuffled; the number leads from a row back to the teacher's distribution for it.
            row["row"] = number  # type: ignore[assignment]
    train_rows = splits["train"]
    check_ends(context.name, train_rows, tokenizer)
    targets = _TeacherTargets(context, tokenizer, endpoints, splits, model.get_output_embeddings().weight.shape[0])
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
    trainer.sft_weight = config.sft_weight
    trainer.on_policy = config.on_policy
    if targets.teacher is None:
        trainer.label_sampled = targets.label_sampled
    engine = _engine(context) if config.on_policy else None
    recorder = AnswerRecorder(context, tokenizer, train_rows.sources)
    trainer.record = recorder.write
    try:
        if engine is not None:
            trainer.sampler = _sampler(context, engine, tokenizer)
        metrics = fit(trainer, context, lambda split: held_out(trainer, splits[split], targets.top_tokens[split]))
    finally:
        if engine is not None:
            engine.close()
    save(context, trainer, tokenizer)
    recorder.finish()
    facts = {"rows": len(train_rows.rows), **counts(splits, "rows"), **targets.facts()}
    facts |= thought_facts(tokenizer, train_rows)
    if engine is not None:
        # The steps follow from the seed, so the count includes the steps of earlier attempts.
        on_policy_steps = (
            is_on_policy_step(trainer.args.seed, step, config.on_policy) for step in range(metrics["steps"])
        )
        facts |= {"own_steps": sum(on_policy_steps), "engine": engine.name}
    return {**metrics, **facts}


Tutor = StageTeacher | EndpointTeacher


class _TeacherTargets:
    """The teachers' distributions for all splits, and a teacher itself if training still needs it."""

    def __init__(
        self,
        context: StageContext,
        tokenizer: Any,
        endpoints: list[ScoringEndpoint | None],
        splits: dict[str, Encoded],
        vocabulary: int,
    ) -> None:
        config: DistillConfig = context.config
        self.context = context
        self.splits = splits
        self.measure = Measure(config.divergence, config.jsd_beta, config.temperature, config.top_k)
        self.collator = AnswerCollator(tokenizer.pad_token_id)
        self.top_tokens: dict[str, list[TopTokens]] = {name: [] for name in splits}
        self.teacher: Teacher | None = None
        self.setting = Setting(context, tokenizer, self.measure, vocabulary, self._load)
        self.tutors = self._open(endpoints)
        # Every row has a teacher before any of them works.
        self.choices = {name: [self._choose(source) for source in split.sources] for name, split in splits.items()}

    def _open(self, endpoints: list[ScoringEndpoint | None]) -> list[Tutor]:
        config: DistillConfig = self.context.config
        stages = self.context.inputs.get("teacher") or self.context.inputs.get("teacher.stage") or []
        artifacts = iter(stages if isinstance(stages, list) else [stages])
        tutors: list[Tutor] = []
        for index, (block, endpoint) in enumerate(zip(config.teachers, endpoints, strict=True)):
            if endpoint is not None:
                tutors.append(EndpointTeacher(self.setting, block, endpoint))
                continue
            make = AlignedTeacher if block.tokens == "aligned" else StageTeacher
            artifact = self.context.artifact("model") if block.self else next(artifacts)
            tutors.append(make(self.setting, block, artifact, _place(self.context, index)))
        return tutors

    def _choose(self, source: dict[str, Any]) -> int:
        """Return the number of the row's teacher."""
        config: DistillConfig = self.context.config
        if config.teacher_column is None:
            return 0
        value = source.get(config.teacher_column)
        matches = [block.match for block in config.teachers]
        if str(value) not in matches:
            value_text = (
                f"has {config.teacher_column} '{value}'" if value is not None else f"lacks {config.teacher_column}"
            )
            raise UserError(
                f"{self.context.name}.teacher: row {source['id']} {value_text}, and the teachers match "
                f"{', '.join(map(str, matches))}. Add a teacher for it, or filter such rows; a recipe keeps a column "
                f"with keep: [{config.teacher_column}]."
            )
        return matches.index(str(value))

    def prepare(self) -> None:
        """Load the teachers' distributions from the cache or compute them; keep a teacher only if it is needed."""
        config: DistillConfig = self.context.config
        if self.measure.top_k is not None:
            for name, split in self.splits.items():
                self.top_tokens[name] = self._label(split.rows, split.sources, self.choices[name])
        # With ``top_k`` the distributions are small enough to store, and the teacher can leave memory before training.
        if self.measure.top_k is not None and not config.on_policy:
            for tutor in self.tutors:
                tutor.release()
        elif self._reads_batches:
            self.teacher = self.tutors[0].teacher()  # type: ignore[union-attr]
        if self._is_partial:
            self._report_absent()

    @property
    def _reads_batches(self) -> bool:
        """True if the teacher reads the student's own batches."""
        return len(self.tutors) == 1 and type(self.tutors[0]) is StageTeacher and self.tutors[0].block.system is None

    @property
    def _is_partial(self) -> bool:
        """True if some tokens may have no distribution."""
        blocks = self.context.config.teachers
        return any(block.tokens == "aligned" or block.api == "completions" for block in blocks)

    def _label(self, rows: list[Any], sources: list[Any], choices: list[int], sampled: bool = False) -> list[TopTokens]:
        """Return each row's tokens of its teacher, each of which answers all of its rows at once."""
        results: list[TopTokens | None] = [None] * len(rows)
        for number, tutor in enumerate(self.tutors):
            chosen = [index for index, choice in enumerate(choices) if choice == number]
            if not chosen:
                continue
            lessons = tutor.lessons([rows[index] for index in chosen], [sources[index] for index in chosen], sampled)
            for index, top_tokens in zip(chosen, tutor.find(lessons, sampled), strict=True):
                results[index] = top_tokens
        return [top_tokens for top_tokens in results if top_tokens is not None]

    def label_sampled(self, rows: list[dict[str, Any]], numbers: list[int]) -> list[TopTokens]:
        """Return the teachers' tokens for sampled rows with the prompts of the training rows ``numbers``."""
        sources = [self.splits["train"].sources[number] for number in numbers]
        return self._label(rows, sources, [self.choices["train"][number] for number in numbers], sampled=True)

    def _absent(self, split: str) -> tuple[int, int]:
        """Return the numbers of a split's tokens without a distribution, and of all its tokens."""
        present = [(tokens.logprobs > ABSENT).any(dim=1) for tokens in self.top_tokens[split]]
        total = sum(len(row) for row in present)
        return total - sum(int(row.sum()) for row in present), total

    def _report_absent(self) -> None:
        absent, total = self._absent("train")
        if absent == total:
            raise UserError(
                f"{self.context.name}: none of the {total} answer tokens aligns with a token of the teacher, so there "
                "is nothing to learn. Use `synthesize` with the teacher, then `sft`."
            )
        self.context.note(
            f"{self.context.name}: {absent} of {total} answer tokens of the train split do not align with the "
            "teacher's and have no divergence"
        )

    def _load(self, artifact: Artifact) -> Teacher:
        low = self.context.precision == "bfloat16"
        model = load_policy(artifact.model, torch.bfloat16 if low else torch.float32)
        model.to(device_of(self.context.runtime)).requires_grad_(False)
        # The teacher computes as the student does, so equal weights give equal distributions.
        reduce_work(model, bfloat16=low, shared_prefixes=shares_prefixes(self.context))
        return Teacher(model, low)

    def facts(self) -> dict[str, Any]:
        """Return the numbers of rows that came from a cache and from a teacher, and of tokens that do not align."""
        facts = {
            "teacher_rows_cached": sum(tutor.rows_cached for tutor in self.tutors),
            "teacher_rows_computed": sum(tutor.rows_computed for tutor in self.tutors),
        }
        if self._is_partial:
            absent, total = self._absent("train")
            facts |= {"tokens_not_aligned": absent, "tokens_taught": total - absent}
        return facts


def _place(context: StageContext, index: int) -> str:
    number = f"[{index}]" if isinstance(context.config.teacher, list) else ""
    return f"{context.name}.teacher{number}"


def _open_endpoints(context: StageContext) -> list[ScoringEndpoint | None]:
    """Return the server of each teacher. Raises ``UserError`` when a key's variable is not set."""
    config: DistillConfig = context.config
    endpoints = []
    for index, block in enumerate(config.teachers):
        endpoint = None
        if block.endpoint is not None:
            assert config.top_k is not None
            place = f"{_place(context, index)}.endpoint"
            endpoint = ScoringEndpoint(block.endpoint, block.api, config.top_k, place)
        endpoints.append(endpoint)
    return endpoints


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


def _sampler(context: StageContext, engine: RolloutEngine, tokenizer: Any) -> Any:
    config: DistillConfig = context.config
    reader = ThoughtReader(tokenizer)

    def sample(model: Any, prompts: list[list[int]], step: int) -> list[Response]:
        # On-policy: the engine gets the student's current weights before each of its steps.
        with torch.no_grad(), full_model(model) as student:
            engine.load_weights(policy_weights(student))
        # Each step has its own seed, so a resumed run samples the same answers as an uninterrupted run.
        sampling = Sampling(
            config.max_tokens,
            config.sample_temperature,
            seed=context.seed + (step << 20),
            thinking_budget=config.thinking_budget,
        )
        return [answers[0] for answers in generate(engine, reader, prompts, sampling)]

    return sample
