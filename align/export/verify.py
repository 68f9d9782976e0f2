"""Verify that an exported folder answers like its checkpoint, in transformers and in vLLM: greedy, float32, per token.

If two answers diverge, the checkpoint scores both candidate tokens. If their probabilities are equal within
rounding, the divergence is a tie, and the answer counts up to there. Anything else is a difference, which is reported
with its position and likely cause. A reward model's scores are compared in the same way.

Each model answers in a separate process, ``python -m align.export.verify JOB RESULT``. The machine then holds one model
at a time, and vLLM, which can start once per process, is loaded as a user would load it. Torch-free until a model runs.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from align.config.runtime import Runtime
from align.errors import StageFailed
from align.export.answers import Job, JobResult, answer_rows, answer_with_adapter, score_in_vllm, score_rows
from align.export.export import Agreement, Source, stored_type
from align.models.chat.render import Message, render_conversation, render_prompt
from align.pipeline.process_limits import relax_collections
from align.store.json_files import DamagedFile, parse_sealed, write_sealed

Runner = Callable[["Job", Path], "JobResult"]
TIE = 1e-3
"""Difference in nats below which rounding may swap two tokens; engines differ by some 1e-5 in float32."""
SCORE_TOLERANCE = 1e-3
"""Largest difference of two scores, relative to their size (at least 1)."""
QUESTIONS: list[tuple[str, str]] = json.loads(Path(__file__).with_name("questions.json").read_text(encoding="utf-8"))
"""Prompts, with answers for a reward model to score."""
READ_WRONGLY = (
    "transformers reads the same files as the checkpoint, so the files are right and vLLM computes something else: a "
    "setting of config.json that it does not know, another rope scaling or window, or for a difference at the first "
    "token a head that is tied here and not there"
)


class JobFailed(StageFailed):
    """A job's process ended without an answer; ``reason`` is the last line that it wrote."""

    def __init__(self, job: Job, exit_code: int, reason: str) -> None:
        super().__init__(f"{job.engine} could not answer from {job.folder} (exit code {exit_code}): {reason}")
        self.reason = reason


def run_job(job: Job, scratch: Path) -> JobResult:
    """Run ``job`` in a separate process. Raises ``JobFailed`` with the last line of its log when it fails."""
    scratch.mkdir(parents=True, exist_ok=True)
    job_file, result_file, log_file = (scratch / name for name in ("job.json", "done.json", "log.txt"))
    write_sealed(job_file, asdict(job))
    # A result of an earlier attempt must not be mistaken for the result of this attempt.
    result_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "align.export.verify", str(job_file), str(result_file)]
    with log_file.open("wb") as log:
        process = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False)
    if process.returncode == 0 and result_file.is_file():
        try:
            return JobResult(**parse_sealed(result_file.read_bytes()))
        except (DamagedFile, TypeError) as error:
            raise StageFailed(f"{job.engine} answered from {job.folder}, but {result_file} {error}.") from None
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise JobFailed(job, process.returncode, lines[-1].strip() if lines else "it said nothing")


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
    rows = render_questions(source, exported)
    adapter = None if source.adapter is None else str(source.adapter)
    output: Literal["tokens", "scores"] = "scores" if source.is_reward() else "tokens"
    source_job = Job("transformers", str(source.folder), output, rows, adapter=adapter)
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

    cause = "what was written is not what was loaded: a weight under another name, or a setting that was not kept"
    if source.adapter is not None:
        cause = "the adapter does not merge as it is applied, or its base is another one than it was trained on"
    # Ties are judged by the checkpoint's own probabilities.
    judge = _Judge(replace(source_job, want="logprobs", round_to=round_to), scratch / "ties", run, cause)
    _compare_export(agreement, expected, Job("transformers", str(exported), output, rows), judge, log)
    return agreement


def verify_adapter(
    source: Source,
    merged: Path | None,
    exported: Path,
    scratch: Path,
    *,
    run: Runner = run_job,
    log: Callable[[str], object] = print,
) -> Agreement:
    """Compare an exported adapter on its base with a checkpoint, in transformers by peft and in vLLM.

    Args:
        source: The base with the original adapter.
        merged: The checkpoint that the training stage saved with the adapter merged in. None if there is none: then
            the original adapter on its base is the measure.
        exported: The folder of the exported adapter, with its tokenizer.
        scratch: A folder for the processes.
        run: Runs a job.
        log: Called with a line for each step.

    Raises:
        StageFailed: For a difference.
    """
    rows = render_questions(source, exported)
    source_job = Job("transformers", str(source.folder), "tokens", rows, adapter=str(source.adapter))
    if merged is not None:
        source_job = replace(source_job, folder=str(merged), adapter=None)
    log("the checkpoint answers, in transformers")
    expected = run(source_job, scratch / "source")
    agreement = Agreement("tokens", len(rows), 0)
    cause = "the adapter is not the checkpoint's, or its base is another one than it was trained on"
    judge = _Judge(replace(source_job, want="logprobs"), scratch / "ties", run, cause)
    job = Job("transformers", str(source.folder), "tokens", rows, adapter=str(exported))
    _compare_export(agreement, expected, job, judge, log)
    return agreement


def _compare_export(
    agreement: Agreement, expected: JobResult, job: Job, judge: _Judge, log: Callable[[str], object]
) -> None:
    """Compare an export with the checkpoint's answers, in transformers and in vLLM.

    ``job`` answers from the export in transformers. Raises ``StageFailed`` for a difference.
    """
    compare = _compare_scores if job.want == "scores" else _compare_tokens
    run = judge.run
    scratch = judge.scratch.parent
    log("the export answers, in transformers")
    in_transformers = run(job, scratch / "transformers")
    compare(agreement, expected, in_transformers, judge)
    if importlib.util.find_spec("vllm") is None:
        agreement.unchecked = "vLLM is not installed"
        return
    log("the export answers, in vLLM")
    try:
        in_vllm = run(replace(job, engine="vllm"), scratch / "vllm")
        agreement.unchecked = in_vllm.unusable
    except JobFailed as error:
        # The folder is right in transformers. An engine that cannot run the model at all is no evidence against it.
        agreement.unchecked = f"vLLM cannot run it ({error.reason})"
    if agreement.unchecked is None:
        # The export is right in transformers, so it is the reference for vLLM.
        reference = replace(judge, job=replace(job, want="logprobs"), cause=READ_WRONGLY)
        compare(agreement, in_transformers, in_vllm, reference)


def render_questions(source: Source, exported: Path) -> list[list[int]]:
    """Return the questions as token ids, which the exported tokenizer and template must reproduce."""
    from align.models.loading import load_tokenizer

    tokenizers = [load_tokenizer(folder) for folder in (source.tokenizer_folder, exported)]
    render = render_conversation if source.is_reward() else render_prompt
    rows = []
    for number, (question, answer) in enumerate(QUESTIONS, start=1):
        messages: list[Message] = [{"role": "user", "content": question}]
        if source.is_reward():
            messages.append({"role": "assistant", "content": answer})
        expected, actual = (render(tokenizer, messages) for tokenizer in tokenizers)
        if expected != actual:
            raise StageFailed(
                f"the exported tokenizer or chat template gives question {number} other tokens, from position "
                f"{_first_difference(expected, actual)} on. Export from the checkpoint's own folder."
            )
        rows.append(expected)
    return rows


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the first index at which two sequences differ, or the length of the shorter one."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


@dataclass(frozen=True)
class _Judge:
    """A model in transformers that tells how far apart two tokens are, and the likely cause of a real difference."""

    job: Job
    scratch: Path
    run: Runner
    cause: str

    def gaps(self, contexts: Sequence[list[int]], pairs: Sequence[tuple[int | None, int | None]]) -> list[float]:
        """Return the difference in nats between the tokens of each pair; infinity if one is None, an answer's end."""
        rows = []
        tokens = []
        for context, pair in zip(contexts, pairs, strict=True):
            if None not in pair:
                # Each context twice: once for each of its two tokens.
                rows += [context, context]
                tokens += [[token] for token in pair if token is not None]
        result = self.run(replace(self.job, rows=rows, responses=tokens), self.scratch) if rows else JobResult()
        logprobs = iter([scores[0] for scores in result.logprobs])
        return [math.inf if None in pair else abs(next(logprobs) - next(logprobs)) for pair in pairs]


def _compare_tokens(agreement: Agreement, expected: JobResult, actual: JobResult, judge: _Judge) -> None:
    """Add a comparison of answers. Raises ``StageFailed`` for a difference that is not a tie."""
    places: list[tuple[int, int]] = []  # row and position of each divergence
    shared = 0  # tokens that agree
    gap = 0.0
    for row, (expected_ids, actual_ids) in enumerate(zip(expected.tokens, actual.tokens, strict=True)):
        length = len(expected_ids)
        if expected_ids != actual_ids:
            # Behind the first difference the contexts differ, so the rest cannot be compared.
            length = _first_difference(expected_ids, actual_ids)
            places.append((row, length))
        shared += length
        logprobs = zip(expected.logprobs[row][:length], actual.logprobs[row][:length], strict=True)
        gap = max([gap, *(abs(a - b) for a, b in logprobs)])
    # Early ties in many answers leave too little that was compared.
    is_enough = shared * 2 >= sum(map(len, expected.tokens))
    problem = _describe_difference(expected, actual, places, judge, is_enough)
    if problem is not None:
        raise StageFailed(
            f"the exported folder answers otherwise: {actual.version} differs from {expected.version} in "
            f"{len(places)} of {len(expected.tokens)} answers, first {problem}. Up to there log-probabilities agree "
            f"within {gap:.2g}. Likely cause: {judge.cause}."
        )
    agreement.add([expected.version, actual.version], gap, len(places), shared)


def _describe_difference(
    expected: JobResult, actual: JobResult, places: Sequence[tuple[int, int]], judge: _Judge, allow_ties: bool
) -> str | None:
    """Return the first divergence that is not a tie, or the first tie without ``allow_ties``; None if there is none."""
    contexts = [[*judge.job.rows[row], *expected.tokens[row][:index]] for row, index in places]
    pairs = [(_token_at(expected.tokens[row], index), _token_at(actual.tokens[row], index)) for row, index in places]
    # A tie in probability may fall either way without any fault; anything further apart is a real difference.
    gaps = judge.gaps(contexts, pairs)
    differences = [number for number, nats in enumerate(gaps) if nats > TIE]
    if not places or (allow_ties and not differences):
        return None
    number = differences[0] if differences else 0
    row, index = places[number]
    expected_token, actual_token = pairs[number]
    if expected_token is None:
        difference = "it continues where the other ends"
    elif actual_token is None:
        difference = "it ends where the other continues"
    else:
        difference = f"token {actual_token} instead of {expected_token}, which are {gaps[number]:.3g} nats apart"
    return f"in answer {row + 1} at position {index + 1}: {difference}"


def _token_at(ids: Sequence[int], index: int) -> int | None:
    return ids[index] if index < len(ids) else None


def _compare_scores(agreement: Agreement, expected: JobResult, actual: JobResult, judge: _Judge) -> None:
    """Add a comparison of scores. Raises ``StageFailed`` for a difference beyond the tolerance."""
    gaps = [abs(a - b) for a, b in zip(expected.scores, actual.scores, strict=True)]
    for number, (gap, score) in enumerate(zip(gaps, expected.scores, strict=True), start=1):
        if not gap <= SCORE_TOLERANCE * max(1.0, abs(score)):  # also for NaN
            raise StageFailed(
                f"the exported folder scores otherwise: {actual.version} gives answer {number} "
                f"{actual.scores[number - 1]:.6g}, {expected.version} {score:.6g}. Likely cause: {judge.cause}."
            )
    agreement.add([expected.version, actual.version], max(gaps), 0, len(gaps))


def execute(job: Job) -> JobResult:
    """Run ``job`` in this process."""
    if job.engine == "vllm":
        from align.inference.vllm import why_model_unusable, why_unusable
        from align.models.compute.processes import device_of

        reason = why_unusable() or why_model_unusable(Path(job.folder), device_of(Runtime()))
        if reason is not None:
            return JobResult(unusable=reason)
    if job.want == "distributions":
        from align.export.distributions import measure_distributions

        return measure_distributions(job)
    if job.engine == "vllm" and job.adapter is not None:
        return answer_with_adapter(job)
    if job.want != "scores":
        return answer_rows(job)
    return score_in_vllm(job) if job.engine == "vllm" else score_rows(job)


def main(arguments: Sequence[str]) -> int:
    """Execute a job and write its result. The last line of the log is the error, which ``run_job`` reports."""
    job_file, result_file = map(Path, arguments)
    try:
        result = execute(Job(**parse_sealed(job_file.read_bytes())))
    except Exception as error:
        traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}\n")
        return 1
    write_sealed(result_file, asdict(result))
    return 0


if __name__ == "__main__":
    relax_collections()
    sys.exit(main(sys.argv[1:]))
