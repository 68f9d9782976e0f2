"""Measure how far an export with rounded weights is from its checkpoint: divergence, perplexity, task score, speed.

The checkpoint answers the questions of the export check greedily, in float32. The export computes its distributions at
the same positions. KL(checkpoint || export) is averaged over the tokens of the answers, and a token agrees if both find
it most probable. Each format has a limit, measured on SmolLM2-135M (``docs/export.md``); an export beyond it fails,
because rounding alone does not go as far.

A quantized file is computed in transformers with its dequantized weights, which shows the error of the weights. An
engine of the format, llama.cpp or vLLM, also shows how the file is read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.data.card import table
from align.errors import StageFailed, UserError
from align.export.answers import Job, JobResult
from align.export.export import Source
from align.export.task_score import ITEMS, TOKENS, change_of_share, check_answers, solved_share, task_prompts
from align.export.verify import QUESTIONS, JobFailed, Runner, render_questions, run_job
from align.pipeline.context import duration
from align.report.page.number_format import MISSING, interval, number, signed, size, value_with_interval

if TYPE_CHECKING:
    from align.evaluation.statistics import Difference, Estimate

TEXT = Path(__file__).with_name("perplexity.txt")
"""Lincoln's Gettysburg Address (1863), and the beginnings of Darwin's Origin of Species and of Dickens's A Tale of Two
Cities (both 1859); they are in the public domain."""
LONGEST = 512
"""Tokens of a part of the text; each part is computed without the parts before it."""
MOST = 4096
"""Most tokens of a text."""


@dataclass(frozen=True)
class Limit:
    """The largest distance of a format from its checkpoint."""

    kl: float
    """Mean divergence per token, in nats."""
    same: float
    """Smallest share of tokens with the same most probable token."""


HEADER = (
    *("engine", "KL per token", "largest KL", "same most probable token", "perplexity"),
    *("tasks solved", "change", "tokens/s"),
)
LIMITS = {
    "f16": Limit(1e-4, 0.99),
    "q8_0": Limit(0.01, 0.95),
    "q4_k": Limit(0.5, 0.7),
    "fp8": Limit(0.1, 0.8),
    "w8a8": Limit(0.1, 0.8),
    "gptq": Limit(1.5, 0.5),
    "awq": Limit(1.5, 0.5),
}
"""Format → limit of its weights, several times what was measured."""
LLAMA_CPP = Limit(0.05, 0.85)
ENGINE_LIMITS = LIMITS | {"f16": LLAMA_CPP, "q8_0": LLAMA_CPP}
"""Format → limit in its engine. llama.cpp also rounds activations: SmolLM2 in q8_0 has 0.0062 nats and 93.9 % there."""


@dataclass(frozen=True)
class Reading:
    """The distributions of one engine, compared with the checkpoint's."""

    engine: str
    """Name and version."""
    kl: float | None
    """None for vLLM, which returns no whole distributions."""
    largest_kl: float | None
    same: float
    perplexity: float
    tokens_per_second: float | None = None
    """Speed of generation; None if the engine computes the format only for comparison."""
    solved: Estimate | None = None
    """Share of solved instructions (``align.export.task_score``)."""
    change: Difference | None = None
    """Of that share, from the checkpoint's in transformers."""


@dataclass(frozen=True)
class Fidelity:
    """Cost of a format."""

    format: str
    bytes: int
    """Size of its weights."""
    plain_bytes: int
    """Size of the checkpoint's weights in its own type."""
    prompts: int
    tokens: int
    """Tokens of the answers that were compared."""
    perplexity: float
    """Of the checkpoint."""
    text_tokens: int
    readings: list[Reading] = field(default_factory=list)
    unchecked: str | None = None
    """The reason if no engine of the format was used."""
    checkpoint: list[Reading] = field(default_factory=list)
    """The checkpoint in transformers in float32, and in vLLM if that is the format's engine."""
    items: int = 0
    """Instructions that were answered."""


@dataclass(frozen=True)
class Comparison:
    """A checkpoint and an export of it."""

    source: Source
    exported: Path
    """A transformers folder that computes the export."""
    format: str
    scratch: Path
    text: Path | None = None
    activations: Literal["int8", "float8"] | None = None
    """Type that the format rounds activations to."""
    plain: Path | None = None
    """A transformers folder of the checkpoint, whose speed in the format's engine is measured."""
    items: int = ITEMS
    """Instructions of the task score; 0 for none."""
    run: Runner = run_job
    log: Callable[[str], object] = print


def measure(comparison: Comparison, sizes: tuple[int, int], engine_job: Job | None = None) -> Fidelity:
    """Compare an export with its checkpoint.

    Args:
        comparison: What is compared.
        sizes: Bytes of the export's weights and of the checkpoint's.
        engine_job: The folder or file for an engine of the format; the other fields are filled in here.

    Raises:
        StageFailed: If a tokenizer reads the questions otherwise, or a divergence is beyond the format's limit.
    """
    source = comparison.source
    rows = render_questions(source, comparison.exported)
    texts = _read_text(comparison.text or TEXT, comparison.exported)
    tasks = task_prompts(comparison.exported, comparison.items)
    comparison.scratch.mkdir(parents=True, exist_ok=True)
    output = str(comparison.scratch / "distributions.npy")
    adapter = None if source.adapter is None else str(source.adapter)
    job = Job("transformers", str(source.folder), "distributions", rows, adapter=adapter, output=output, texts=texts)
    job = replace(job, tasks=tasks, task_tokens=TOKENS)
    before = _run(comparison, job, "source", "the checkpoint")
    job = replace(job, folder=str(comparison.exported), adapter=None, responses=before.tokens)
    after = _run(comparison, replace(job, activations=comparison.activations), "exported", "the export")
    # The checkpoint is equal to itself, and its speed is known.
    same = sum(map(len, before.tokens))
    checkpoint = [_reading(replace(before, same=same), before, comparison, before.seconds)]
    readings = [_reading(after, before, comparison, None)]
    unchecked = None
    if engine_job is not None:
        prompts = _prompt_texts(comparison.exported)
        job = replace(job, engine=engine_job.engine, dtype=engine_job.dtype, prompts=prompts, ends=engine_job.ends)
        native = _run_engine(comparison, replace(job, folder=engine_job.folder), "the export")
        unchecked = native.unusable
        if unchecked is None:
            readings.append(_reading(native, before, comparison, native.seconds))
        if unchecked is None and comparison.plain is not None:
            native = _run_engine(comparison, replace(job, folder=str(comparison.plain)), "the checkpoint")
            checkpoint += [] if native.unusable else [_reading(native, before, comparison, native.seconds)]
    fidelity = Fidelity(
        comparison.format,
        *sizes,
        len(rows),
        same,
        checkpoint[0].perplexity,
        len(before.text_logprobs),
        readings,
        unchecked,
        checkpoint,
        len(tasks),
    )
    require_close(fidelity)
    return fidelity


def _run(comparison: Comparison, job: Job, folder: str, model: str) -> JobResult:
    """Run a job in a process; log its work before and its time after, also if it fails."""
    tasks = f" and {len(job.tasks)} instructions" if job.tasks else ""
    text = sum(map(len, job.texts))
    comparison.log(f"{model} answers {len(job.rows)} prompts{tasks} and reads {text:,} tokens, in {job.engine}")
    started = time.monotonic()
    try:
        return comparison.run(job, comparison.scratch / folder)
    finally:
        comparison.log(f"  {duration(time.monotonic() - started)}, with the start of the process")


def _run_engine(comparison: Comparison, job: Job, model: str) -> JobResult:
    """Return the result of the format's engine. vLLM may lack a kernel for this processor, which is no fault."""
    try:
        return _run(comparison, job, "engine", model)
    except JobFailed as error:
        if job.engine != "vllm":
            raise
        return JobResult(unusable=f"vLLM cannot run it here ({error.reason})")


def _reading(result: JobResult, before: JobResult, comparison: Comparison, seconds: float | None) -> Reading:
    """Return the reading of a result, which was generated in some seconds, against the checkpoint's result."""
    tokens = sum(map(len, result.tokens))
    scores = check_answers(comparison.exported, result.task_answers)
    expected = check_answers(comparison.exported, before.task_answers)
    return Reading(
        result.version,
        sum(result.kl) / len(result.kl) if result.kl else None,
        max(result.kl, default=None),
        result.same / sum(map(len, before.tokens)),
        _perplexity(result.text_logprobs),
        None if not seconds else tokens / seconds,
        solved_share(scores),
        None if result.task_answers is before.task_answers else change_of_share(scores, expected),
    )


def require_close(fidelity: Fidelity) -> None:
    """Raise ``StageFailed`` for a reading beyond its limit: first of the weights, then of the engine."""
    limits = (LIMITS[fidelity.format], ENGINE_LIMITS[fidelity.format])
    for reading, limit in zip(fidelity.readings, limits, strict=False):
        is_close = reading.kl is None or reading.kl <= limit.kl
        if not (is_close and reading.same >= limit.same):
            raise StageFailed(
                f"the export diverges from the checkpoint in {reading.engine}: {_nats(reading.kl)} and "
                f"{100 * reading.same:.1f} % of the most probable tokens, where {fidelity.format} has at most "
                f"{limit.kl:g} nats and at least {100 * limit.same:g} %. Either the engine reads the file otherwise, "
                "or this model does not bear this rounding."
            )


def _perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


def _read_text(file: Path, folder: Path) -> list[list[int]]:
    """Return the tokens of a text in parts. Raises ``UserError`` for a file that is unreadable or too short."""
    from align.models.loading import load_tokenizer

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--text {file}: cannot be read ({error}).") from None
    tokenizer: Any = load_tokenizer(folder)
    ids = list(tokenizer(text).input_ids)[:MOST]
    if len(ids) < 2:
        raise UserError(f"--text {file}: has {len(ids)} tokens; a perplexity needs two at least.")
    parts = [ids[start : start + LONGEST] for start in range(0, len(ids), LONGEST)]
    return [part for part in parts if len(part) > 1]


def _prompt_texts(folder: Path) -> list[str]:
    """Return the questions as text."""
    from align.models.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    talks = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
    return [tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for talk in talks]


def cost_lines(fidelity: Fidelity) -> list[str]:
    """Return the cost as Markdown: size, divergence, perplexity, task score and speed."""
    share = fidelity.bytes / fidelity.plain_bytes
    rows = [_row(reading, f"checkpoint, {reading.engine}") for reading in fidelity.checkpoint]
    rows += [_row(reading, f"this, {reading.engine}") for reading in fidelity.readings]
    lines = [
        f"Its weights have {size(fidelity.bytes)}, {100 * share:.0f} % of the checkpoint's "
        f"{size(fidelity.plain_bytes)}. When it was written, it was compared with the checkpoint in float32: on "
        f"{fidelity.tokens:,} tokens of greedy answers to {fidelity.prompts} prompts, and by the perplexity of a text "
        f"of {fidelity.text_tokens:,} tokens, which is {fidelity.perplexity:.3f} for the checkpoint.",
    ]
    if fidelity.items:
        lines += [
            "",
            f"Both answered {fidelity.items} instructions greedily. Solved are those whose answer satisfies every "
            "constraint, as a program checks; in brackets 95 % intervals. Changes are paired with the checkpoint's "
            "answers in transformers.",
        ]
    lines += ["", *table(HEADER, rows, numbers=range(1, len(HEADER)))]
    if fidelity.unchecked is not None:
        lines += ["", f"Not checked: {fidelity.unchecked}."]
    return lines


def cost_summary(fidelity: Fidelity) -> str:
    """Return the cost on one line."""
    parts = [
        f"{_nats(reading.kl)} and {100 * reading.same:.1f} % of the most probable tokens in "
        f"{reading.engine}, perplexity {fidelity.perplexity:.3f} → {reading.perplexity:.3f}{_tasks(fidelity, reading)}"
        for reading in fidelity.readings
    ]
    return f"Checked: {'; '.join(parts)}"


def _tasks(fidelity: Fidelity, reading: Reading) -> str:
    """Return the task scores of the checkpoint and of the export."""
    before = fidelity.checkpoint[0].solved if fidelity.checkpoint else None
    if before is None or reading.solved is None:
        return ""
    return f", tasks solved {number(before.value)} → {number(reading.solved.value)}"


def _nats(kl: float | None) -> str:
    return "KL not measured" if kl is None else f"{kl:.2g} nats per token"


def _row(reading: Reading, name: str) -> tuple[str, ...]:
    solved = reading.solved
    change = reading.change
    return (
        name,
        MISSING if reading.kl is None else f"{reading.kl:.2g}",
        MISSING if reading.largest_kl is None else f"{reading.largest_kl:.2g}",
        f"{100 * reading.same:.1f} %",
        f"{reading.perplexity:.3f}",
        MISSING if solved is None else value_with_interval(solved.as_dict()),
        "" if change is None else f"{signed(change.value)} ({interval(change.as_dict(), True)})",
        "" if reading.tokens_per_second is None else f"{reading.tokens_per_second:.0f}",
    )
