"""Verify that an exported folder answers like its checkpoint, in transformers and in vLLM: greedy, float32, per token.

If two answers diverge, the checkpoint scores both candidate tokens. If their probabilities are equal within
rounding, the divergence is a tie, and the answer counts up to there. Anything else is a difference, which is reported
with its position and likely cause. A reward model's scores are compared in the same way. Torch-free; the models run in
separate processes (``verify_worker.py``).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from align.errors import StageFailed
from align.export.export import Source, stored_type
from align.export.verify_worker import Job, JobFailed, JobResult, run_job
from align.models.chat.render import Message, render_conversation, render_prompt

Runner = Callable[[Job, Path], JobResult]

MAX_TOKENS = 48
TIE = 1e-3
"""Difference in nats below which rounding may swap two tokens; engines differ by some 1e-5 in float32."""
SCORE_TOLERANCE = 1e-3
"""Largest difference of two scores, relative to their size (at least 1)."""
QUESTIONS: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "Paris."),
    ("Write two sentences about the sea.", "It is wide. It is never still."),
    ("What is 17 + 25? Explain briefly.", "17 + 25 = 42: 17 + 20 = 37, and 5 more."),
    ("Translate into German: Good morning, my friend.", "Guten Morgen, mein Freund."),
    ("def add(a, b):\n    return", "a + b"),
    ("¿Qué tiempo hace hoy? 🙂", "Hace sol."),
    ("List three colors.", "Red, green, blue."),
    ("Tell me a very short story about a fox.", "A fox found a key. It opened nothing. She kept it."),
)
"""Prompts, with answers for a reward model to score."""
READ_WRONGLY = (
    "transformers reads the same files as the checkpoint, so the files are right and vLLM computes something else: a "
    "setting of config.json that it does not know, another rope scaling or window, or for a difference at the first "
    "token a head that is tied here and not there"
)


@dataclass
class Agreement:
    """Result of a verification, for the user and the model card."""

    what: str
    """``tokens`` or ``scores``."""
    prompts: int
    compared: int
    """Tokens, or scores, that agree in every engine."""
    engines: list[str] = field(default_factory=list)
    largest_gap: float = 0.0
    """Largest difference between two engines: of a chosen token's log-probability in nats, or of a score."""
    ties: int = 0
    """Answers that diverge at two tokens of equal probability."""
    rounding: int | None = None
    """Answers that change only by the type of the written weights; None if the weights keep their type."""
    unchecked: str | None = None
    """The reason if vLLM was not checked."""

    def add(self, expected: JobResult, actual: JobResult, gap: float, ties: int, compared: int) -> None:
        """Add the comparison of two engines."""
        self.engines = list(dict.fromkeys([*self.engines, expected.version, actual.version]))
        self.largest_gap = max(self.largest_gap, gap)
        self.ties += ties
        self.compared = compared if self.compared == 0 else min(self.compared, compared)


def verify(
    source: Source,
    exported: Path,
    dtype: str,
    scratch: Path,
    *,
    run: Runner = run_job,
    log: Callable[[str], object] = print,
) -> Agreement:
    """Compare ``exported``, whose weights are ``dtype``, with ``source``; ``scratch`` is a folder for the processes.

    Weights that were rounded on export are compared with the checkpoint's own, rounded in the same way. Raises
    ``StageFailed`` for a difference. A model that vLLM cannot run is reported as not checked there.
    """
    rows = _render_questions(source, exported)
    adapter = None if source.adapter is None else str(source.adapter)
    output: Literal["tokens", "scores"] = "scores" if source.is_reward() else "tokens"
    compare = _compare_scores if source.is_reward() else _compare_tokens
    source_job = Job("transformers", str(source.folder), output, rows, max_tokens=MAX_TOKENS, adapter=adapter)
    keeps_type = dtype == "float32" or (adapter is None and dtype == stored_type(source.folder))
    round_to = None if keeps_type else dtype
    agreement = Agreement(output, len(rows), 0)

    log("the checkpoint answers, in transformers")
    unrounded = run(source_job, scratch / "source")
    expected = unrounded
    if round_to is not None:
        # Rounding changes answers by itself, so the export is compared with a rounded checkpoint.
        expected = run(replace(source_job, round_to=round_to), scratch / "rounded")
        if not source.is_reward():
            agreement.rounding = sum(a != b for a, b in zip(unrounded.tokens, expected.tokens, strict=True))
    # Only used if two answers diverge: it scores both candidate tokens.
    gap_job = replace(source_job, want="logprobs", round_to=round_to)

    log("the exported folder answers, in transformers")
    exported_job = Job("transformers", str(exported), output, rows, max_tokens=MAX_TOKENS)
    in_transformers = run(exported_job, scratch / "transformers")
    # Ties are judged by the checkpoint's own probabilities.
    meter = _GapMeter(gap_job, scratch / "ties", run)
    compare(agreement, _Comparison(expected, in_transformers, meter, _cause_of_wrong_export(source)))

    if importlib.util.find_spec("vllm") is None:
        agreement.unchecked = "vLLM is not installed"
        return agreement
    log("the exported folder answers, in vLLM")
    try:
        in_vllm = run(replace(exported_job, engine="vllm"), scratch / "vllm")
    except JobFailed as error:
        # The folder is right in transformers. An engine that cannot run the model at all is no evidence against it.
        agreement.unchecked = f"vLLM cannot run it ({error.reason})"
        return agreement
    if in_vllm.unusable is not None:
        agreement.unchecked = in_vllm.unusable
        return agreement
    # The exported folder is right in transformers, so it is the reference for vLLM.
    exported_meter = replace(meter, job=replace(gap_job, folder=str(exported), adapter=None, round_to=None))
    compare(agreement, _Comparison(in_transformers, in_vllm, exported_meter, READ_WRONGLY))
    return agreement


def _cause_of_wrong_export(source: Source) -> str:
    if source.adapter is not None:
        return "the adapter does not merge as it is applied, or its base is another one than it was trained on"
    return "what was written is not what was loaded: a weight under another name, or a setting that was not kept"


def _render_questions(source: Source, exported: Path) -> list[list[int]]:
    """Return the questions as token ids, which the exported tokenizer and template must reproduce."""
    expected = _render_with(source.tokenizer_folder, source.is_reward())
    actual = _render_with(exported, source.is_reward())
    for number, (expected_ids, actual_ids) in enumerate(zip(expected, actual, strict=True), start=1):
        if expected_ids != actual_ids:
            raise StageFailed(
                f"the exported tokenizer or chat template gives question {number} other tokens, from position "
                f"{_first_difference(expected_ids, actual_ids)} on. Export from the checkpoint's own folder."
            )
    return expected


def _render_with(folder: Path, with_answers: bool) -> list[list[int]]:
    from align.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    rows = []
    for question, answer in QUESTIONS:
        messages: list[Message] = [{"role": "user", "content": question}]
        if with_answers:
            rows.append(render_conversation(tokenizer, [*messages, {"role": "assistant", "content": answer}]))
        else:
            rows.append(render_prompt(tokenizer, messages))
    return rows


@dataclass(frozen=True)
class _GapMeter:
    """Measures by a model in transformers how far apart the probabilities of two tokens are."""

    job: Job
    scratch: Path
    run: Runner

    def gaps(self, contexts: Sequence[list[int]], pairs: Sequence[tuple[int, int]]) -> list[float]:
        """Return the difference in nats between the two tokens of each pair, after its context."""
        # Each context twice: once for each of its two tokens.
        rows = [list(context) for context in contexts for _ in range(2)]
        tokens = [[token] for pair in pairs for token in pair]
        result = self.run(replace(self.job, rows=rows, responses=tokens), self.scratch)
        logprobs = [scores[0] for scores in result.logprobs]
        return [abs(first - second) for first, second in zip(logprobs[::2], logprobs[1::2], strict=True)]


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the first index at which two sequences differ, or the length of the shorter one."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


@dataclass(frozen=True)
class _Divergence:
    """Place at which an answer differs from the expected one, with both tokens; None for an answer that has ended."""

    row: int
    index: int
    expected: int | None
    actual: int | None


@dataclass(frozen=True)
class _Comparison:
    """Results of two engines, and how a difference is measured and explained."""

    expected: JobResult
    actual: JobResult
    meter: _GapMeter
    cause: str


def _compare_tokens(agreement: Agreement, comparison: _Comparison) -> None:
    """Add a comparison of answers. Raises ``StageFailed`` for a difference that is not a tie."""
    expected = comparison.expected
    actual = comparison.actual
    divergences: list[_Divergence] = []
    shared = 0  # tokens that agree
    gap = 0.0
    for row, (expected_ids, actual_ids) in enumerate(zip(expected.tokens, actual.tokens, strict=True)):
        length = len(expected_ids)
        if expected_ids != actual_ids:
            length = _first_difference(expected_ids, actual_ids)
            # Behind the first difference the contexts differ, so the rest cannot be compared.
            divergences.append(
                _Divergence(
                    row,
                    length,
                    expected_ids[length] if length < len(expected_ids) else None,
                    actual_ids[length] if length < len(actual_ids) else None,
                )
            )
        shared += length
        logprobs = zip(expected.logprobs[row][:length], actual.logprobs[row][:length], strict=True)
        gap = max([gap, *(abs(a - b) for a, b in logprobs)])
    if divergences:
        _refuse_unless_tied(comparison, divergences, gap, shared)
    agreement.add(expected, actual, gap, len(divergences), shared)


def _refuse_unless_tied(comparison: _Comparison, divergences: Sequence[_Divergence], gap: float, shared: int) -> None:
    """Raise ``StageFailed`` unless all divergences are ties and at least half of the tokens could be compared."""
    expected = comparison.expected
    actual = comparison.actual
    # A tie in probability may fall either way without any fault; anything further apart is a real difference.
    gaps = _measure_divergences(comparison, divergences)
    are_ties = all(nats <= TIE for nats in gaps)
    # Early ties in many answers leave too little that was compared.
    if are_ties and shared * 2 >= sum(map(len, expected.tokens)):
        return
    # Report the first real difference, or the first tie if there are too many of them.
    index = 0 if are_ties else next(index for index, nats in enumerate(gaps) if nats > TIE)
    first = divergences[index]
    nats = gaps[index]
    if first.expected is None:
        difference = "it goes on where the other ends"
    elif first.actual is None:
        difference = "it ends where the other goes on"
    else:
        difference = f"token {first.actual} instead of {first.expected}, which are {nats:.3g} nats apart"
    raise StageFailed(
        f"the exported folder answers otherwise: {actual.version} differs from {expected.version} in "
        f"{len(divergences)} of {len(expected.tokens)} answers, first in answer {first.row + 1} at position "
        f"{first.index + 1}: {difference}. Up to there log-probabilities agree within {gap:.2g}. Likely cause: "
        f"{comparison.cause}."
    )


def _measure_divergences(comparison: _Comparison, divergences: Sequence[_Divergence]) -> list[float]:
    """Return the gap in nats at each divergence; infinity if an answer has ended."""
    contexts = []
    pairs = []
    for divergence in divergences:
        if divergence.expected is not None and divergence.actual is not None:
            prompt = comparison.meter.job.rows[divergence.row]
            contexts.append([*prompt, *comparison.expected.tokens[divergence.row][: divergence.index]])
            pairs.append((divergence.expected, divergence.actual))
    measured = iter(comparison.meter.gaps(contexts, pairs) if pairs else [])
    return [math.inf if None in (entry.expected, entry.actual) else next(measured) for entry in divergences]


def _compare_scores(agreement: Agreement, comparison: _Comparison) -> None:
    """Add a comparison of scores. Raises ``StageFailed`` for a difference beyond the tolerance."""
    expected = comparison.expected
    actual = comparison.actual
    gaps = [abs(a - b) for a, b in zip(expected.scores, actual.scores, strict=True)]
    for number, (gap, score) in enumerate(zip(gaps, expected.scores, strict=True), start=1):
        if not gap <= SCORE_TOLERANCE * max(1.0, abs(score)):  # also for NaN
            raise StageFailed(
                f"the exported folder scores otherwise: {actual.version} gives answer {number} "
                f"{actual.scores[number - 1]:.6g}, {expected.version} {score:.6g}. Likely cause: "
                f"{comparison.cause}."
            )
    agreement.add(expected, actual, max(gaps), 0, len(gaps))
