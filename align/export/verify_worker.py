"""Answer a few prompts or score a few texts by one model in a separate process: ``python -m ... JOB.json``.

The machine then holds one model at a time, and vLLM, which can start once per process, is loaded as a user would load
it. ``verify.py`` runs it and compares the results.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.config.validation import validate_plain
from align.errors import StageFailed
from align.pipeline.process_limits import relax_collections
from align.store.json_files import DamagedFile, parse_sealed, write_sealed

Engine = Literal["transformers", "vllm"]
FLOAT32_GPU_SHARE = 0.9


@dataclass(frozen=True)
class Job:
    """Work of one process, in float32. ``rows`` are token ids: prompts, or for ``scores`` whole conversations."""

    engine: Engine
    folder: str
    want: Literal["tokens", "scores", "logprobs"]
    """``tokens``: greedy answers with their log-probabilities; ``logprobs``: the log-probabilities of ``responses``."""
    rows: list[list[int]]
    responses: list[list[int]] = field(default_factory=list)
    max_tokens: int = 48
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
    # A result of an earlier attempt must not be mistaken for this one's.
    result_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "align.export.verify_worker", str(job_file), str(result_file)]
    with log_file.open("wb") as log:
        process = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False)
    if process.returncode == 0 and result_file.is_file():
        try:
            return JobResult(**parse_sealed(result_file.read_bytes()))
        except (DamagedFile, TypeError) as error:
            raise StageFailed(f"{job.engine} answered from {job.folder}, but {result_file} {error}.") from None
    lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise JobFailed(job, process.returncode, lines[-1].strip() if lines else "it said nothing")


def execute(job: Job) -> JobResult:
    """Run ``job`` in this process."""
    if job.engine == "vllm":
        from align.config.runtime import Runtime
        from align.inference.vllm import why_model_unusable, why_unusable
        from align.models.compute.processes import device_of

        reason = why_unusable() or why_model_unusable(Path(job.folder), device_of(Runtime()))
        if reason is not None:
            return JobResult(unusable=reason)
        return _vllm_scores(job) if job.want == "scores" else _answers(job)
    return _scores(job) if job.want == "scores" else _answers(job)


def _answers(job: Job) -> JobResult:
    from align.config.runtime import Runtime
    from align.inference.engine import open_engine
    from align.inference.protocol import Sampling

    # Room for the longest prompt with the longest answer.
    longest = max(map(len, job.rows)) + max([job.max_tokens, *map(len, job.responses)])
    settings = {"name": job.engine, "batch_size": 16, "gpu_memory": FLOAT32_GPU_SHARE, "sleep": False}
    runtime = validate_plain(Runtime, {"engine": settings})
    engine: Any = open_engine(
        Path(job.folder), runtime, precision="float32", max_length=longest + 1, seed=0, warn=print
    )
    try:
        if job.engine == "transformers":
            engine.model = _prepare_model(engine.model, job)
        version = _version(job.engine)
        if job.want == "logprobs":
            return JobResult(version, logprobs=engine.score_tokens(job.rows, job.responses, 1.0))
        responses = engine.generate(job.rows, Sampling(max_tokens=job.max_tokens, temperature=0.0))
        return JobResult(
            version, [response.token_ids for (response,) in responses], [response.logprobs for (response,) in responses]
        )
    finally:
        engine.close()


def _prepare_model(model: Any, job: Job) -> Any:
    """Return the model with the job's adapter and rounded weights."""
    from align.export.export import round_weights
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

    from align.config.runtime import Runtime
    from align.export.export import Source, load_source, round_weights
    from align.models.compute.processes import device_of, use_threads

    use_threads(Runtime())
    source = Source(Path(job.folder), None if job.adapter is None else Path(job.adapter))
    model = load_source(source).to(device_of(Runtime()))
    if job.round_to is not None:
        round_weights(model, job.round_to)
    with torch.inference_mode():
        scores = [float(model(input_ids=torch.tensor([row], device=model.device)).logits[0, 0]) for row in job.rows]
    return JobResult(_version(job.engine), scores=scores)


def _vllm_scores(job: Job) -> JobResult:
    from vllm import LLM, PoolingParams

    from align.config.runtime import Runtime
    from align.models.compute.processes import device_of, use_threads

    use_threads(Runtime())
    memory_options: dict[str, Any] = {"gpu_memory_utilization": FLOAT32_GPU_SHARE}
    # On a CPU vLLM needs an absolute size of the cache.
    if device_of(Runtime()).type == "cpu":
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
