"""Stage ``sample``: sample responses chunk by chunk, score and pair them; a killed stage resumes at its last chunk."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from align.config.runtime.rollouts import SAMPLE_CHUNK
from align.config.scores import describe_score, verifier_kinds
from align.config.stages.sample import SampleConfig
from align.data.final_answers import AnswerText
from align.data.rows import kept_columns, read_rows
from align.data.steps.pairs import make_pairs
from align.environments.user_models import check_user_rows
from align.errors import UserError
from align.evaluation.score_validation.stage import validate_stage_score
from align.inference.protocol import Response, Sampling
from align.inference.thoughts import ThoughtReader, check_stage_room, generate
from align.models.chat.render import render_prompt
from align.models.chat.template_settings import TemplateSettings
from align.models.compute.processes import use_threads
from align.models.loading import load_tokenizer
from align.pipeline.context import StageContext
from align.scoring.score import WeightedSum, open_score
from align.stages.prompt_responses import write_lines, write_table
from align.stages.sample_episodes import LateEngine, SampledSplit, sample_episodes
from align.stages.sample_rollouts import SampledRollouts
from align.store.fingerprint import digest
from align.store.json_files import read_entry, write_entry
from align.training.rows import refuse_long_rows
from align.verifiers.verdict import explain_low_scores

SPLITS = ("train", "test")


@dataclass
class SplitPrompts:
    """Prompts of one split that are short enough: rows and their token ids."""

    split: str
    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    too_long: int
    """Number of prompts that were dropped."""

    def chunks(self) -> range:
        """Return the index of each chunk's first row."""
        return range(0, len(self.rows), SAMPLE_CHUNK)


def run(context: StageContext) -> dict[str, Any]:
    """Sample both splits, write ``train.parquet``, ``test.parquet`` and ``samples.jsonl``; return counts and rates.

    Raises ``UserError`` if there is no training pair.
    """
    use_threads(context.runtime)
    # Rows and score are checked before the policy is loaded.
    environment = context.config.environment
    if environment is not None:
        rows = {split: _read_rows(context, split) for split in SPLITS}
        for split_rows in rows.values():
            check_user_rows(environment, split_rows, context.name)
    # None if only an environment scores.
    scorer = open_score(context)
    validation_facts: dict[str, Any] = {}
    if scorer is not None:
        train, test = (_read_rows(context, split) for split in SPLITS)
        validation_facts = validate_stage_score(context, scorer.parts, train, test)
    tokenizer = load_tokenizer(context.artifact("policy").model)
    TemplateSettings.of(context.config).apply(tokenizer, f"stages.{context.name}.")
    check_stage_room(context, tokenizer)
    if environment is None:
        assert scorer is not None, "without an environment something scores"
        results, facts = _sample_responses(context, tokenizer, scorer)
    else:
        results, facts = sample_episodes(context, tokenizer, scorer, rows)
    metrics = _write(context, results)
    return metrics | validation_facts | ({} if scorer is None else scorer.facts()) | facts


def _sample_responses(
    context: StageContext, tokenizer: Any, scorer: WeightedSum
) -> tuple[list[SampledSplit], dict[str, Any]]:
    """Return samples, pairs and counts of each split, and the engine's name and speed."""
    config = context.config
    splits = [_read_prompts(context, split, tokenizer) for split in SPLITS]
    samples: dict[str, list[dict[str, Any]]] = {prompts.split: [] for prompts in splits}
    sampler = _ChunkSampler(context, tokenizer, sum(len(prompts.rows) for prompts in splits) * config.n)
    for prompts in splits:
        for start in prompts.chunks():
            samples[prompts.split] += sampler.chunk(prompts, start)
    sampler.engine.close()
    # Close the engine before scoring, so a reward model has the device to itself.
    _score(scorer, context, splits, samples)
    sampler.rollouts.finish(samples)
    results = [_result(context, prompts, samples[prompts.split]) for prompts in splits]
    return results, {"engine": sampler.engine_name, **sampler.speed()}


def _read_rows(context: StageContext, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split, at most ``max_prompts``. Raises ``UserError`` if there are no train rows."""
    rows = read_rows(context.artifact("prompts").split(split))
    if split == "train" and not rows:
        raise UserError("prompts: there are no train rows; give their recipe a test_size below 1.")
    return rows[: getattr(context.config.max_prompts, split)]


def _read_prompts(context: StageContext, split: str, tokenizer: Any) -> SplitPrompts:
    rows = _read_rows(context, split)
    rendered = [(row, render_prompt(tokenizer, row["prompt"], row.get("tools"))) for row in rows]
    # A cut prompt would be another question, so long prompts are skipped and counted.
    fitting = [(row, ids) for row, ids in rendered if len(ids) <= context.config.max_prompt_tokens]
    too_long = len(rows) - len(fitting)
    if split == "train" and context.config.long_rows == "refuse":
        lengths = [len(ids) for _, ids in rendered]
        refuse_long_rows(context.name, "max_prompt_tokens", context.config.max_prompt_tokens, lengths, "train prompts")
    if too_long:
        context.warn(
            f"{too_long} of {len(rows)} {split} prompts are longer than max_prompt_tokens "
            f"({context.config.max_prompt_tokens}) and were skipped"
        )
    if rows and not fitting:
        raise UserError(f"every {split} prompt is longer than max_prompt_tokens {context.config.max_prompt_tokens}.")
    return SplitPrompts(split, [row for row, _ in fitting], [ids for _, ids in fitting], too_long)


class _ChunkSampler:
    """Samples chunks of responses, or reads an earlier attempt's chunks; the first new chunk starts the engine."""

    def __init__(self, context: StageContext, tokenizer: Any, total: int) -> None:
        self.context = context
        self.total = total
        self.reader = ThoughtReader(tokenizer)
        self.rollouts = SampledRollouts(context, tokenizer)
        self.engine = LateEngine(context)
        self.engine_name = "none"
        self.done = self.tokens = self.new_tokens = 0
        self.seconds = 0.0

    def chunk(self, prompts: SplitPrompts, start: int) -> list[dict[str, Any]]:
        """Return the samples of one chunk: ``n`` texts per row, whether each finished, and their numbers of tokens."""
        path = self.context.checkpoints / f"{prompts.split}-{start:07d}.jsonl"
        sampling = self._sampling(prompts, start)
        key = digest(
            {
                # All that the responses depend on. A chunk of an earlier attempt is used only under the same key.
                "policy": self.context.artifact("policy").weights,
                "precision": self.context.precision,
                "sampling": sampling.settings(),
                "rows": [row["id"] for row in prompts.rows[start : start + SAMPLE_CHUNK]],
                "prompts": prompts.prompts[start : start + SAMPLE_CHUNK],
            }
        )
        lines = read_entry(path, key, self.context.warn)
        if lines is None or not self.rollouts.has_chunk(prompts.split, start):
            samples = self._sample(prompts, start, sampling)
            # Write each chunk immediately, so a kill loses at most the chunk that is being sampled.
            write_entry(path, key, [self.engine_name, *samples])
        else:
            # The engine's name is stored, because no engine is started if all chunks are on disk.
            self.engine_name, *samples = lines
        self.done += sum(len(sample["texts"]) for sample in samples)
        self.tokens += sum(sum(sample["tokens"]) for sample in samples)
        self.context.progress(self.done, self.total, "responses", self.tokens)
        return samples

    def _sampling(self, prompts: SplitPrompts, start: int) -> Sampling:
        """Return the sampling parameters; the seed depends only on the split and the chunk's start."""
        config = self.context.config
        return Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            n=config.n,
            # The splits' seeds are far apart, so chunks of different splits never share a seed.
            seed=self.context.seed + start + (1 << 40) * SPLITS.index(prompts.split),
            thinking_budget=config.thinking_budget,
        )

    def _sample(self, prompts: SplitPrompts, start: int, sampling: Sampling) -> list[dict[str, Any]]:
        engine = self.engine.open()
        self.engine_name = engine.name
        chunk = slice(start, start + SAMPLE_CHUNK)
        started = time.perf_counter()
        responses = generate(engine, self.reader, prompts.prompts[chunk], sampling, self._report)
        self.seconds += time.perf_counter() - started
        rows = zip(prompts.rows[chunk], prompts.prompts[chunk], responses, strict=True)
        self.rollouts.write_chunk(prompts.split, start, rows)
        samples = [
            {
                "id": row["id"],
                "texts": [response.text for response in row_responses],
                "finished": [response.finished for response in row_responses],
                "tokens": [len(response.token_ids) for response in row_responses],
                **_thoughts(row_responses),
            }
            for row, row_responses in zip(prompts.rows[chunk], responses, strict=True)
        ]
        self.new_tokens += sum(sum(sample["tokens"]) for sample in samples)
        return samples

    def _report(self, completed: int, _: int) -> None:
        self.context.progress(self.done + completed, self.total, "responses", self.tokens)

    def speed(self) -> dict[str, float]:
        """Return the tokens sampled, and the tokens per second of this attempt."""
        return {"tokens": self.tokens, "tokens_per_second": self.new_tokens / self.seconds if self.seconds else 0.0}


def _thoughts(responses: list[Response]) -> dict[str, list[Any]]:
    """Return the places of the thoughts in the responses to a prompt; empty if there are none."""
    if not any(response.thought_tokens for response in responses):
        return {}
    return {
        "thought_tokens": [response.thought_tokens for response in responses],
        "thought_end": [response.thought_end for response in responses],
        "open_thought": [response.is_open for response in responses],
    }


def _answers(sample: dict[str, Any]) -> list[AnswerText]:
    """Return the texts of a sample after their thoughts."""
    texts = sample["texts"]
    ends, are_open = (sample.get(name, [0] * len(texts)) for name in ("thought_end", "open_thought"))
    return [AnswerText.cut(*thought) for thought in zip(texts, ends, map(bool, are_open), strict=True)]


def _score(
    scorer: WeightedSum, context: StageContext, splits: list[SplitPrompts], samples: dict[str, list[dict[str, Any]]]
) -> None:
    """Add ``scores`` to every sample, ``parts``, the scores of each reward of a list, and judges' ``explanations``."""
    cut_off_score = context.config.cut_off_score
    for prompts in splits:
        rows: list[dict[str, Any]] = []
        texts: list[str] = []
        cut_off: list[bool] = []
        for row, sample in zip(prompts.rows, samples[prompts.split], strict=True):
            rows += [row] * len(sample["texts"])
            texts += _answers(sample)
            cut_off += [not has_end for has_end in sample["finished"]]
        if not rows:
            continue
        context.phase(f"scoring {len(rows)} responses")
        # One call scores all responses of a split, so a reward model can batch them.
        scored = scorer.score(rows, texts, cut_off)
        columns = scored.columns()
        explanations = scored.explanations()
        start = 0
        for sample in samples[prompts.split]:
            end = start + len(sample["texts"])
            if any(explanations[start:end]):
                sample["explanations"] = explanations[start:end]
            sample["scores"] = list(map(_or_none, scored.total[start:end]))
            if columns:
                sample["parts"] = {name: list(map(_or_none, values[start:end])) for name, values in columns.items()}
            start = end
            if cut_off_score is not None:
                pairs = zip(sample["scores"], sample["finished"], strict=True)
                sample["scores"] = [value if has_end else cut_off_score for value, has_end in pairs]


def _or_none(value: float) -> float | None:
    """Return a number as JSON has it: null for a metric that a response lacks."""
    return value if math.isfinite(value) else None


def _result(context: StageContext, prompts: SplitPrompts, samples: list[dict[str, Any]]) -> SampledSplit:
    """Return a split's samples as lines, and its pairs."""
    config = context.config
    lines = []
    for row, sample in zip(prompts.rows, samples, strict=True):
        columns = kept_columns(row)
        row_columns = {"row": columns} if columns else {}
        lines.append({"split": prompts.split, "prompt": row["prompt"], **sample, **row_columns})
    pairs, counts = make_pairs(
        prompts.rows,
        [sample["texts"] for sample in samples],
        [sample["scores"] for sample in samples],
        config.pairs,
        noise=config.noise,
        seed=context.seed,
        finished=[sample["finished"] for sample in samples],
    )
    return SampledSplit(prompts.split, lines, pairs, {**counts, "too_long": prompts.too_long})


def _write(context: StageContext, results: list[SampledSplit]) -> dict[str, Any]:
    """Write samples and pairs, and return the stage's metrics."""
    config = context.config
    metrics: dict[str, Any] = {}
    write_lines(context.output / "samples.jsonl", [line for result in results for line in result.lines])
    for result in results:
        write_table(context.output / f"{result.split}.parquet", result.pairs, ("chosen", "rejected"))
        values = result.metrics | _rates(result.lines)
        metrics |= {f"{result.split}_{name}": value for name, value in values.items()}
    reasons = _score_reasons(config, metrics)
    if metrics["train_pairs"] == 0:
        raise UserError(
            f"no train pair came out of {metrics['train_prompts']} prompts: every prompt's responses score alike (mean "
            f"{metrics.get('train_mean_score', 0):.3f}) or are identical. Raise n or temperature, or check score "
            f"'{_describe_scorer(config)}' on samples like those in this stage's log."
            + "".join(f" {line}." for line in reasons)
        )
    # Training is possible without test pairs, so this is only a warning.
    if metrics["test_pairs"] == 0:
        context.warn("no test pair came out, so a reward model's accuracy cannot be measured; raise max_prompts.test")
    return metrics | ({"score_reasons": reasons} if reasons else {})


def _score_reasons(config: SampleConfig, metrics: dict[str, Any]) -> list[str]:
    """Return why the verifiers score nearly all responses to the train prompts 0."""
    prefix = "train_mean_score_"
    rates = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    if config.score is None and config.reward is None:
        rates[""] = metrics.get("train_mean_score", 0.0)
    return explain_low_scores(verifier_kinds(config), rates, metrics["train_prompts"] * config.n, rates)


def _describe_scorer(config: SampleConfig) -> str:
    """Return the scorer's description for messages."""
    if config.score is None and config.environment is not None and config.reward is None:
        return config.environment.label
    return describe_score(config.score) or "reward"


def _rates(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Return means over all responses: score and its parts, share that ended with EOS, tokens."""
    rates = {}
    for name, field in (("mean_score", "scores"), ("eos_rate", "finished"), ("mean_tokens", "tokens")):
        # An episode whose environment failed has no score.
        values = [float(value) for sample in samples for value in sample[field] if value is not None]
        if values:
            rates[name] = sum(values) / len(values)
    count = sum(len(sample["texts"]) for sample in samples)
    for name, field in (("mean_thought_tokens", "thought_tokens"), ("open_thoughts", "open_thought")):
        values = [float(value) for sample in samples for value in sample.get(field, ())]
        # Prompts whose responses all have no thought lack the field.
        if values:
            rates[name] = sum(values) / count
    names = dict.fromkeys(name for sample in samples for name in sample.get("parts", ()))
    for name in names:
        values = [value for sample in samples for value in sample["parts"].get(name, ()) if value is not None]
        if values:
            rates[f"mean_score_{name}"] = sum(values) / len(values)
    return rates
