"""Answers of one model in this process: greedy answers, log-probabilities of tokens, distributions, scores.

``align.export.verify`` and ``align.export.fidelity`` start a process per model. Torch-free until a model runs.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.config.runtime import Runtime
from align.config.validation import validate_plain
from align.export.export import Source, load_source, round_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Engine = Literal["transformers", "vllm", "llama.cpp"]
FLOAT32_GPU_SHARE = 0.9
MAX_TOKENS = 48


@dataclass(frozen=True)
class Job:
    """Work of one process, in float32. ``rows`` are token ids: prompts, or for ``scores`` whole conversations."""

    engine: Engine
    folder: str
    want: Literal["tokens", "scores", "logprobs", "distributions"]
    """``tokens``: greedy answers with their log-probabilities; ``logprobs``: the log-probabilities of ``responses``;
    ``distributions``: the log-probabilities of every token at each position of ``responses``, written to ``output`` or
    compared with it."""
    rows: list[list[int]]
    responses: list[list[int]] = field(default_factory=list)
    max_tokens: int = MAX_TOKENS
    adapter: str | None = None
    """For transformers: an adapter that is applied, not merged."""
    round_to: str | None = None
    """For transformers: type that the weights are rounded to first; an adapter is merged then."""
    dtype: str = "float32"
    """For vLLM's distributions: type of the computation."""
    output: str | None = None
    """File of distributions, (tokens, vocabulary) in float32. If it exists, the model is compared with it."""
    texts: list[list[int]] = field(default_factory=list)
    """Texts whose perplexity is measured, as token ids."""
    prompts: list[str] = field(default_factory=list)
    """For llama.cpp: ``rows`` as text, which its tokenizer must read as the same tokens."""
    ends: list[int] = field(default_factory=list)
    """For llama.cpp: the tokens that end an answer."""
    activations: Literal["int8", "float8"] | None = None
    """For transformers: type that the inputs of linear layers are rounded to, per token."""
    tasks: list[list[int]] = field(default_factory=list)
    """For distributions: more prompts, which are answered greedily in ``task_tokens`` tokens at most."""
    task_tokens: int = MAX_TOKENS


@dataclass(frozen=True)
class JobResult:
    """Result of a job; ``unusable`` says why the engine cannot be used at all."""

    version: str = ""
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    unusable: str | None = None
    kl: list[float] = field(default_factory=list)
    """Divergence at each position, in nats: sum over tokens of p (log p - log q), with p from ``Job.output``."""
    same: int = 0
    """Positions at which both models find the same token most probable. vLLM counts tokens of ``responses``."""
    text_logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token of ``Job.texts`` but the first of each text."""
    seconds: float = 0.0
    """Time to generate the tokens, without loading the model."""
    task_answers: list[list[int]] = field(default_factory=list)
    """Answers to ``Job.tasks``."""


def answer_with_adapter(job: Job) -> JobResult:
    """Answer in vLLM with a LoRA adapter that is not merged."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    from align.export.lora import allowed_rank, check_lora

    longest = max(map(len, job.rows)) + job.max_tokens + 1
    rank = allowed_rank(check_lora(Path(str(job.adapter))).rank)
    options = vllm_options(longest, len(job.rows), "float32")
    llm = LLM(model=job.folder, trust_remote_code=False, enable_lora=True, max_lora_rank=rank, **options)
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=row) for row in job.rows],
        SamplingParams(temperature=0.0, max_tokens=job.max_tokens, logprobs=0),
        use_tqdm=False,
        lora_request=LoRARequest("exported", 1, str(job.adapter)),
    )
    tokens = []
    logprobs = []
    for output in outputs:
        answer = output.outputs[0]
        places: Any = answer.logprobs
        tokens.append(list(answer.token_ids))
        logprobs.append([float(place[token].logprob) for place, token in zip(places, tokens[-1], strict=True)])
    return JobResult(engine_version(job.engine), tokens, logprobs)


def vllm_options(longest: int, rows: int, dtype: str) -> dict[str, Any]:
    """Return the options of an in-process vLLM for ``rows`` sequences of at most ``longest`` tokens."""
    memory: dict[str, Any] = {"gpu_memory_utilization": FLOAT32_GPU_SHARE}
    # On a CPU vLLM needs an absolute size of the cache.
    if compute_device().type == "cpu":
        memory = {"kv_cache_memory_bytes": 2**28, "block_size": 32}
    return {
        "dtype": dtype,
        "max_model_len": longest,
        "max_num_seqs": max(rows, 8),
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(rows, 8) * longest,
        "disable_log_stats": True,
        **memory,
    }


def answer_rows(job: Job) -> JobResult:
    """Answer the rows of a job greedily, or score its responses."""
    from align.inference.engine import open_engine
    from align.inference.protocol import Sampling

    # Room for the longest prompt with the longest answer.
    longest = max(map(len, job.rows)) + max([job.max_tokens, *map(len, job.responses)])
    settings = {"name": job.engine, "batch_size": 32, "gpu_memory": FLOAT32_GPU_SHARE, "sleep": False}
    runtime = validate_plain(Runtime, {"engine": settings})
    options: dict[str, Any] = {"precision": "float32", "max_length": longest + 1, "seed": 0, "warn": print}
    engine: Any = open_engine(Path(job.folder), runtime, **options)
    try:
        if job.engine == "transformers":
            engine.model = _prepare_model(engine.model, job)
        version = engine_version(job.engine)
        if job.want == "logprobs":
            return JobResult(version, logprobs=engine.score_tokens(job.rows, job.responses, 1.0))
        started = time.monotonic()
        responses = engine.generate(job.rows, Sampling(max_tokens=job.max_tokens, temperature=0.0))
        seconds = time.monotonic() - started
        tokens = [response.token_ids for (response,) in responses]
        return JobResult(version, tokens, [response.logprobs for (response,) in responses], seconds=seconds)
    finally:
        engine.close()


def _prepare_model(model: PreTrainedModel, job: Job) -> Any:
    """Return the model with the job's adapter, rounded weights and rounded activations."""
    from align.export.export import round_activations
    from align.models.checkpoints.conversion import attach

    if job.adapter is not None:
        device = next(model.parameters()).device
        model = attach(model, Path(job.adapter), merge=job.round_to is not None).to(device)
    if job.round_to is not None:
        model = round_weights(model, job.round_to)
    if job.activations is not None:
        round_activations(model, job.activations)
    return model.requires_grad_(False)


def score_rows(job: Job) -> JobResult:
    """Score by transformers' own forward pass, one conversation at a time, so there is no padding."""
    import torch

    device = compute_device()
    model = load_source(Source(Path(job.folder), None if job.adapter is None else Path(job.adapter))).to(device)
    if job.round_to is not None:
        model = round_weights(model, job.round_to)
    with torch.inference_mode():
        scores = [float(model(input_ids=torch.tensor([row], device=device)).logits[0, 0]) for row in job.rows]
    return JobResult(engine_version(job.engine), scores=scores)


def score_in_vllm(job: Job) -> JobResult:
    """Score in vLLM."""
    from vllm import LLM, PoolingParams

    longest = max(map(len, job.rows)) + 1
    llm = LLM(model=job.folder, trust_remote_code=False, runner="pooling", **vllm_options(longest, 8, "float32"))
    # The raw score, as transformers returns it: no activation on top.
    outputs = llm.encode(
        [{"prompt_token_ids": row} for row in job.rows],  # type: ignore[arg-type]
        pooling_params=PoolingParams(use_activation=False),
        pooling_task="classify",
        use_tqdm=False,
    )
    return JobResult(engine_version(job.engine), scores=[float(output.outputs.data[0]) for output in outputs])


def compute_device() -> Any:
    """Use the machine's threads and return its device."""
    from align.models.compute.processes import device_of, use_threads

    use_threads(Runtime())
    return device_of(Runtime())


def engine_version(engine: Engine) -> str:
    """Return an engine's name and version."""
    return f"{engine} {getattr(sys.modules[engine], '__version__', '?')}"
