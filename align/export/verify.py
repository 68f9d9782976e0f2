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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from align.config.runtime import Runtime
from align.config.validation import validate_plain
from align.errors import StageFailed
from align.export.export import Agreement, Source, load_source, round_weights, stored_type
from align.models.chat.render import Message, render_conversation, render_prompt
from align.pipeline.process_limits import relax_collections
from align.store.json_files import DamagedFile, parse_sealed, write_sealed

Engine = Literal["transformers", "vllm"]
Runner = Callable[["Job", Path], "JobResult"]
FLOAT32_GPU_SHARE = 0.9
MAX_TOKENS = 48
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


@dataclass(frozen=True)
class Job:
    """Work of one process, in float32. ``rows`` are token ids: prompts, or for ``scores`` whole conversations."""

    engine: Engine
    folder: str
    want: Literal["tokens", "scores", "logprobs"]
    """``tokens``: greedy answers with their log-probabilities; ``logprobs``: the log-probabilities of ``responses``."""
    rows: list[list[int]]
    responses: list[list[int]] = field(default_factory=list)
    max_tokens: int = MAX_TOKENS
    adapter: str | None = None
    """For transformers: an adapter that is applied, not merged."""
    round_to: str | None = None
    """For transformers: type that the weights are rounded to first; an adapter is merged then."""


@dataclass(frozen=True)
class JobResult:
    """Result of a job; ``unusable`` says why the engine cannot be used at all."""

    version: str = ""
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    unusable: str | None = None


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
    rows = _render_questions(source, exported)
    adapter = None if source.adapter is None else str(source.adapter)
    output: Literal["tokens", "scores"] = "scores" if source.is_reward() else "tokens"
    compare = _compare_scores if source.is_reward() else _compare_tokens
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

    log("the exported folder answers, in transformers")
    exported_job = Job("transformers", str(exported), output, rows)
    in_transformers = run(exported_job, scratch / "transformers")
    cause = "what was written is not what was loaded: a weight under another name, or a setting that was not kept"
    if source.adapter is not None:
        cause = "the adapter does not merge as it is applied, or its base is another one than it was trained on"
    # Ties are judged by the checkpoint's own probabilities.
    judge = replace(source_job, want="logprobs", round_to=round_to)
    compare(agreement, expected, in_transformers, _Judge(judge, scratch / "ties", run, cause))
    if importlib.util.find_spec("vllm") is None:
        agreement.unchecked = "vLLM is not installed"
        return agreement
    log("the exported folder answers, in vLLM")
    try:
        in_vllm = run(replace(exported_job, engine="vllm"), scratch / "vllm")
        agreement.unchecked = in_vllm.unusable
    except JobFailed as error:
        # The folder is right in transformers. An engine that cannot run the model at all is no evidence against it.
        agreement.unchecked = f"vLLM cannot run it ({error.reason})"
    if agreement.unchecked is not None:
        return agreement
    # The exported folder is right in transformers, so it is the reference for vLLM.
    judge = replace(exported_job, want="logprobs")
    compare(agreement, in_transformers, in_vllm, _Judge(judge, scratch / "ties", run, READ_WRONGLY))
    return agreement


def _render_questions(source: Source, exported: Path) -> list[list[int]]:
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


# ---- in the process of a model ------------------------------------------------------------------------------------


def execute(job: Job) -> JobResult:
    """Run ``job`` in this process."""
    if job.engine == "vllm":
        from align.inference.vllm import why_model_unusable, why_unusable
        from align.models.compute.processes import device_of

        reason = why_unusable() or why_model_unusable(Path(job.folder), device_of(Runtime()))
        if reason is not None:
            return JobResult(unusable=reason)
    if job.want != "scores":
        return _answers(job)
    return _vllm_scores(job) if job.engine == "vllm" else _scores(job)


def _answers(job: Job) -> JobResult:
    from align.inference.engine import open_engine
    from align.inference.protocol import Sampling

    # Room for the longest prompt with the longest answer.
    longest = max(map(len, job.rows)) + max([job.max_tokens, *map(len, job.responses)])
    settings = {"name": job.engine, "batch_size": 16, "gpu_memory": FLOAT32_GPU_SHARE, "sleep": False}
    runtime = validate_plain(Runtime, {"engine": settings})
    options: dict[str, Any] = {"precision": "float32", "max_length": longest + 1, "seed": 0, "warn": print}
    engine: Any = open_engine(Path(job.folder), runtime, **options)
    try:
        if job.engine == "transformers":
            engine.model = _prepare_model(engine.model, job)
        version = _version(job.engine)
        if job.want == "logprobs":
            return JobResult(version, logprobs=engine.score_tokens(job.rows, job.responses, 1.0))
        responses = engine.generate(job.rows, Sampling(max_tokens=job.max_tokens, temperature=0.0))
        tokens = [response.token_ids for (response,) in responses]
        return JobResult(version, tokens, [response.logprobs for (response,) in responses])
    finally:
        engine.close()


def _prepare_model(model: Any, job: Job) -> Any:
    """Return the model with the job's adapter and rounded weights."""
    from align.models.checkpoints.conversion import attach

    if job.adapter is not None:
        device = next(model.parameters()).device
        model = attach(model, Path(job.adapter), merge=job.round_to is not None).to(device)
    if job.round_to is not None:
        model = round_weights(model, job.round_to)
    return model.requires_grad_(False)


def _scores(job: Job) -> JobResult:
    """Score by transformers' own forward pass, one conversation at a time, so there is no padding."""
    import torch

    device = _device()
    model = load_source(Source(Path(job.folder), None if job.adapter is None else Path(job.adapter))).to(device)
    if job.round_to is not None:
        model = round_weights(model, job.round_to)
    with torch.inference_mode():
        scores = [float(model(input_ids=torch.tensor([row], device=device)).logits[0, 0]) for row in job.rows]
    return JobResult(_version(job.engine), scores=scores)


def _vllm_scores(job: Job) -> JobResult:
    from vllm import LLM, PoolingParams

    memory_options: dict[str, Any] = {"gpu_memory_utilization": FLOAT32_GPU_SHARE}
    # On a CPU vLLM needs an absolute size of the cache.
    if _device().type == "cpu":
        memory_options = {"kv_cache_memory_bytes": 2**28, "block_size": 32}
    longest = max(map(len, job.rows)) + 1
    llm = LLM(
        model=job.folder,
        trust_remote_code=False,
        runner="pooling",
        dtype="float32",
        max_model_len=longest,
        max_num_seqs=8,
        enforce_eager=True,
        enable_chunked_prefill=False,
        max_num_batched_tokens=8 * longest,
        disable_log_stats=True,
        **memory_options,
    )
    # The raw score, as transformers returns it: no activation on top.
    outputs = llm.encode(
        [{"prompt_token_ids": row} for row in job.rows],  # type: ignore[arg-type]
        pooling_params=PoolingParams(use_activation=False),
        pooling_task="classify",
        use_tqdm=False,
    )
    return JobResult(_version(job.engine), scores=[float(output.outputs.data[0]) for output in outputs])


def _device() -> Any:
    """Use the machine's threads and return its device."""
    from align.models.compute.processes import device_of, use_threads

    use_threads(Runtime())
    return device_of(Runtime())


def _version(engine: Engine) -> str:
    return f"{engine} {getattr(sys.modules[engine], '__version__', '?')}"


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
