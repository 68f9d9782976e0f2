"""The work of the ``sample`` stage: chunks of prompts answered, scored and kept, so that a killed stage goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.config.batch_sizes import SAMPLE_CHUNK
from align.data.pairs import make_pairs
from align.data.rows import read_rows, write_rows
from align.data.scoring import function_scorer
from align.errors import UserError
from align.inference.engine import open_engine
from align.inference.protocol import RolloutEngine, Sampling
from align.models.loading import load_tokenizer
from align.models.render import render_prompt
from align.models.threads import device_of, use_threads
from align.pipeline.context import StageContext
from align.store.fingerprint import digest
from align.store.sealed import read_entry, write_entry

SPLITS = ("train", "test")


@dataclass
class Job:
    """Prompts of one split: rows and their token ids, too long ones left out."""

    split: str
    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    too_long: int

    def chunks(self) -> range:
        """Where each chunk starts."""
        return range(0, len(self.rows), SAMPLE_CHUNK)


def run(context: StageContext) -> dict[str, Any]:
    """Sample both splits, write ``train.parquet``, ``test.parquet`` and ``samples.jsonl``; return counts and rates.

    Raises ``UserError`` when no train pair comes out.
    """
    use_threads(context.runtime)
    config = context.config
    tokenizer = load_tokenizer(context.artifact("policy").model)
    jobs = [_job(context, split, tokenizer) for split in SPLITS]
    samples = {job.split: [] for job in jobs}  # type: dict[str, list[dict[str, Any]]]
    made = _Chunks(context, sum(len(job.rows) for job in jobs) * config.n)
    for job in jobs:
        for start in job.chunks():
            samples[job.split] += made.chunk(job, start)
    made.close()
    _score(context, jobs, samples)
    metrics = _write(context, jobs, samples)
    return metrics | {"engine": made.engine_name, **made.speed()}


def _job(context: StageContext, split: str, tokenizer: Any) -> Job:
    rows = read_rows(context.artifact("prompts").split(split))
    rows = rows[: getattr(context.config.max_prompts, split)]
    rendered = [(row, render_prompt(tokenizer, row["prompt"], row.get("tools"))) for row in rows]
    kept = [(row, ids) for row, ids in rendered if len(ids) <= context.config.max_prompt_tokens]
    if len(kept) < len(rows):
        context.warn(
            f"{len(rows) - len(kept)} of {len(rows)} {split} prompts are longer than max_prompt_tokens "
            f"({context.config.max_prompt_tokens}) and left out"
        )
    if rows and not kept:
        raise UserError(f"every {split} prompt is longer than max_prompt_tokens {context.config.max_prompt_tokens}.")
    return Job(split, [row for row, _ in kept], [ids for _, ids in kept], len(rows) - len(kept))


class _Chunks:
    """Chunks of responses, read back where an earlier attempt made them; the engine starts with the first new one."""

    def __init__(self, context: StageContext, total: int) -> None:
        self.context, self.total = context, total
        self.engine: RolloutEngine | None = None
        self.engine_name = "none"
        self.done = self.tokens = self.new_tokens = 0
        self.seconds = 0.0

    def chunk(self, job: Job, start: int) -> list[dict[str, Any]]:
        """Samples of one chunk: ``n`` texts per row, whether each finished, and its tokens."""
        path = self.context.checkpoints / f"{job.split}-{start:07d}.jsonl"
        sampling = self._sampling(job, start)
        key = digest(
            {
                "policy": self.context.artifact("policy").weights,
                "precision": self.context.config.precision,
                "sampling": asdict(sampling),
                "rows": [row["id"] for row in job.rows[start : start + SAMPLE_CHUNK]],
                "prompts": job.prompts[start : start + SAMPLE_CHUNK],
            }
        )
        lines = read_entry(path, key, self.context.warn)
        if lines is None:
            found = self._sample(job, start, sampling)
            write_entry(path, key, [self.engine_name, *found])
        else:
            self.engine_name, *found = lines
        self.done += sum(len(sample["texts"]) for sample in found)
        self.tokens += sum(sum(sample["tokens"]) for sample in found)
        self.context.progress(self.done, self.total, "responses", self.tokens)
        return found

    def _sampling(self, job: Job, start: int) -> Sampling:
        """The seed follows from where the chunk starts: it is the same whether or not an earlier one was read back."""
        config = self.context.config
        return Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            n=config.n,
            seed=self.context.seed + start + (1 << 40) * SPLITS.index(job.split),
        )

    def _sample(self, job: Job, start: int, sampling: Sampling) -> list[dict[str, Any]]:
        context, config = self.context, self.context.config
        if self.engine is None:
            self.engine = open_engine(
                context.artifact("policy").model,
                context.runtime,
                precision=config.precision,
                max_length=config.max_prompt_tokens + config.max_tokens,
                seed=context.seed,
                warn=context.warn,
                on_hang=context.fail_at_once,
            )
            self.engine_name = self.engine.name
        began = time.perf_counter()
        answers = self.engine.generate(job.prompts[start : start + SAMPLE_CHUNK], sampling, self._report)
        self.seconds += time.perf_counter() - began
        found = [
            {
                "id": row["id"],
                "texts": [answer.text for answer in some],
                "finished": [answer.finished for answer in some],
                "tokens": [len(answer.token_ids) for answer in some],
            }
            for row, some in zip(job.rows[start : start + SAMPLE_CHUNK], answers, strict=True)
        ]
        self.new_tokens += sum(sum(sample["tokens"]) for sample in found)
        return found

    def _report(self, done: int, _: int) -> None:
        self.context.progress(self.done + done, self.total, "responses", self.tokens)

    def speed(self) -> dict[str, float]:
        """Tokens sampled, and tokens a second in this attempt."""
        return {"tokens": self.tokens, "tokens_per_second": self.new_tokens / self.seconds if self.seconds else 0.0}

    def close(self) -> None:
        """Free the engine before scoring, which may load a model of its own."""
        if self.engine is not None:
            self.engine.close()


def _score(context: StageContext, jobs: list[Job], samples: dict[str, list[dict[str, Any]]]) -> None:
    score = _scorer(context)
    for job in jobs:
        flat = [(row, i, sample) for row, sample in zip(job.rows, samples[job.split], strict=True)
                for i in range(len(sample["texts"]))]  # fmt: skip
        if not flat:
            continue
        values = score(
            [row for row, _, _ in flat],
            [sample["texts"][i] for _, i, sample in flat],
            [not sample["finished"][i] for _, i, sample in flat],
        )
        cut_off = context.config.cut_off_score
        for (_, i, sample), value in zip(flat, values, strict=True):
            if cut_off is not None and not sample["finished"][i]:
                value = cut_off
            sample.setdefault("scores", [0.0] * len(sample["texts"]))[i] = value


def _scorer(context: StageContext) -> Callable[[list[dict[str, Any]], list[str], list[bool]], list[float]]:
    if context.config.score is not None:
        return function_scorer(context.config.score).score
    from align.models.reward import RewardModel

    model = RewardModel(context.artifact("reward").model, device_of(context.runtime), context.config.precision)
    return lambda rows, texts, cut: model.score(
        [row["prompt"] for row in rows], texts, [not one for one in cut], [row.get("tools") for row in rows]
    )


def _write(context: StageContext, jobs: list[Job], samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    config, metrics = context.config, {}  # type: Any, dict[str, Any]
    with (context.output / "samples.jsonl").open("w", encoding="utf-8") as file:
        for job in jobs:
            for row, sample in zip(job.rows, samples[job.split], strict=True):
                line = {"split": job.split, "prompt": row["prompt"], **sample}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    for job in jobs:
        some = samples[job.split]
        pairs, counts = make_pairs(
            job.rows,
            [sample["texts"] for sample in some],
            [sample["scores"] for sample in some],
            config.pairs,
            config.noise,
            context.seed,
            [sample["finished"] for sample in some],
        )
        write_pairs(context.output / f"{job.split}.parquet", pairs)
        metrics |= {f"{job.split}_{name}": count for name, count in counts.items()}
        metrics[f"{job.split}_too_long"] = job.too_long
        metrics |= {f"{job.split}_{name}": value for name, value in _rates(some).items()}
    if metrics["train_pairs"] == 0:
        raise UserError(
            f"no train pair came out of {metrics['train_prompts']} prompts: every prompt's responses score alike (mean "
            f"{metrics.get('train_mean_score', 0):.3f}) or are identical. Raise n or temperature, or check score "
            f"'{config.score or 'reward'}' on samples like those in this stage's log."
        )
    if metrics["test_pairs"] == 0:
        context.warn("no test pair came out, so a reward model's accuracy cannot be measured; raise max_prompts.test")
    return metrics


def write_pairs(path: Path, pairs: list[dict[str, Any]]) -> None:
    """Write preference rows, with their columns even when there are none."""
    if pairs:
        write_rows(path, pairs)
        return
    import pyarrow.parquet as pq

    blank = {"id": "", "source": "", "prompt": [], "checks": "", "chosen": [], "rejected": []}
    write_rows(path, [blank])
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def _rates(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Means over all responses: score, share that ended by itself, tokens."""
    found = {}
    for name, field in (("mean_score", "scores"), ("eos_rate", "finished"), ("mean_tokens", "tokens")):
        values = [float(value) for sample in samples for value in sample[field]]
        if values:
            found[name] = sum(values) / len(values)
    return found
