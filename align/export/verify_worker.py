"""One model answers a few prompts, or scores a few texts, in a process of its own: ``python -m ... JOB.json``.

A machine then holds one model at a time, and vLLM, which a process can start once, is loaded as anybody loads it. Used
by ``agreement.py``; left out is any comparison.
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
from align.store.json_files import DamagedFile, parse_sealed, write_sealed

Engine = Literal["transformers", "vllm"]
FLOAT32_GPU_SHARE = 0.9


@dataclass(frozen=True)
class Job:
    """What one process does, in float32. ``rows`` are token ids: prompts, or for ``scores`` whole conversations."""

    engine: Engine
    folder: str
    want: Literal["tokens", "scores", "logprobs"]
    """``tokens``: greedy answers with their log-probabilities; ``logprobs``: those of ``responses``."""
    rows: list[list[int]]
    responses: list[list[int]] = field(default_factory=list)
    max_tokens: int = 48
    adapter: str | None = None
    """Of transformers only: an adapter beside the model, not merged."""
    round_to: str | None = None
    """Of transformers only: the type that the weights are rounded to before they compute; adapters are merged then."""


@dataclass(frozen=True)
class Done:
    """What came back; ``unusable`` says why the engine could not be used at all."""

    version: str = ""
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    unusable: str | None = None


def run_job(job: Job, scratch: Path) -> Done:
    """Do ``job`` in a process of its own. Raises ``StageFailed`` with what it said last when it fails."""
    scratch.mkdir(parents=True, exist_ok=True)
    asked, answered, said = (scratch / name for name in ("job.json", "done.json", "log.txt"))
    write_sealed(asked, asdict(job))
    answered.unlink(missing_ok=True)
    command = [sys.executable, "-m", "align.export.verify_worker", str(asked), str(answered)]
    with said.open("wb") as log:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ended.returncode == 0 and answered.is_file():
        try:
            return Done(**parse_sealed(answered.read_bytes()))
        except (DamagedFile, TypeError) as error:
            raise StageFailed(f"{job.engine} answered from {job.folder}, but {answered} {error}.") from None
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise StageFailed(
        f"{job.engine} could not answer from {job.folder} (exit code {ended.returncode}): "
        + (lines[-1].strip() if lines else "it said nothing")
    )


def do(job: Job) -> Done:
    """Do ``job`` in this process."""
    if job.engine == "vllm":
        from align.inference.vllm import why_unusable

        reason = why_unusable()
        if reason is not None:
            return Done(unusable=reason)
        return _vllm_scores(job) if job.want == "scores" else _answers(job)
    return _scores(job) if job.want == "scores" else _answers(job)


def _answers(job: Job) -> Done:
    from align.config.runtime import Runtime
    from align.inference.engine import open_engine
    from align.inference.protocol import Sampling

    longest = max(map(len, job.rows)) + max([job.max_tokens, *map(len, job.responses)])
    settings = {"name": job.engine, "batch_size": 16, "gpu_memory": FLOAT32_GPU_SHARE, "sleep": False}
    runtime = validate_plain(Runtime, {"engine": settings})
    engine: Any = open_engine(
        Path(job.folder), runtime, precision="float32", max_length=longest + 1, seed=0, warn=print
    )
    try:
        if job.engine == "transformers":
            engine.model = _changed(engine.model, job)
        version = _version(job.engine)
        if job.want == "logprobs":
            return Done(version, logprobs=engine.score_tokens(job.rows, job.responses, 1.0))
        found = engine.generate(job.rows, Sampling(max_tokens=job.max_tokens, temperature=0.0))
        return Done(version, [one.token_ids for (one,) in found], [one.logprobs for (one,) in found])
    finally:
        engine.close()


def _changed(model: Any, job: Job) -> Any:
    """The model with the job's adapter, and with rounded weights."""
    from align.export.export import attach, round_weights

    if job.adapter is not None:
        device = next(model.parameters()).device
        model = attach(model, Path(job.adapter), merge=job.round_to is not None).to(device)
    if job.round_to is not None:
        model = round_weights(model, job.round_to)
    return model.requires_grad_(False)


def _scores(job: Job) -> Done:
    """By transformers' own forward pass, one conversation at a time: no padding can matter."""
    import torch

    from align.config.runtime import Runtime
    from align.export.export import Source, load_source, round_weights
    from align.models.threads import device_of, use_threads

    use_threads(Runtime())
    source = Source(Path(job.folder), None if job.adapter is None else Path(job.adapter))
    model = load_source(source).to(device_of(Runtime()))
    if job.round_to is not None:
        round_weights(model, job.round_to)
    with torch.inference_mode():
        scores = [float(model(input_ids=torch.tensor([row], device=model.device)).logits[0, 0]) for row in job.rows]
    return Done(_version(job.engine), scores=scores)


def _vllm_scores(job: Job) -> Done:
    from vllm import LLM, PoolingParams

    from align.config.runtime import Runtime
    from align.models.threads import device_of, use_threads

    use_threads(Runtime())
    memory: dict[str, Any] = {"gpu_memory_utilization": FLOAT32_GPU_SHARE}
    if device_of(Runtime()).type == "cpu":
        memory = {"kv_cache_memory_bytes": 2**28, "block_size": 32}
    longest = max(map(len, job.rows)) + 1
    llm = LLM(
        model=job.folder, trust_remote_code=False, runner="pooling",
        dtype="float32", max_model_len=longest, max_num_seqs=8, enforce_eager=True,
        enable_chunked_prefill=False, max_num_batched_tokens=8 * longest, disable_log_stats=True, **memory,
    )  # fmt: skip
    found = llm.encode(
        [{"prompt_token_ids": row} for row in job.rows],  # type: ignore[arg-type]
        pooling_params=PoolingParams(use_activation=False), pooling_task="classify", use_tqdm=False,
    )  # fmt: skip
    return Done(_version(job.engine), scores=[float(one.outputs.data[0]) for one in found])


def _version(engine: Engine) -> str:
    return f"{engine} {getattr(sys.modules[engine], '__version__', '?')}"


def main(words: Sequence[str]) -> int:
    """Read a job, write what came of it; an error's last line is what a reader needs, so it comes last."""
    asked, answered = map(Path, words)
    try:
        done = do(Job(**parse_sealed(asked.read_bytes())))
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: " + " ".join(str(error).split())[:500], file=sys.stderr)
        return 1
    write_sealed(answered, asdict(done))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
