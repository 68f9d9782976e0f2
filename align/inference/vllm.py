"""Rollouts by vLLM, in this process, beside the trainer.

One engine per process: ``load_weights`` puts another policy into the one there is. What is not public in vLLM is
``vllm_insides.py``'s. Left out: servers, tensor parallelism, LoRA requests.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.config.batch_sizes import CPU_STEP_TOKENS
from align.config.runtime import EngineConfig
from align.inference.protocol import Progress, Response, Sampling
from align.inference.sleep import CACHE, WEIGHTS, Sleep
from align.inference.vllm_insides import install_sampler, model_runner, notice_steps, stored_adapter
from align.inference.watchdog import Watchdog
from align.inference.weights import refuse_missing, weight_names, with_tied_head
from align.models.loading import load_tokenizer


def why_unusable() -> str | None:
    """Why vLLM cannot be used in this process, or None when it can. Imports it."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    _prepare_environment()
    try:
        with _caller_undisturbed():  # the import alone draws random numbers
            import vllm  # noqa: F401
    except Exception as error:  # a broken build fails in many ways
        return f"vLLM does not import ({type(error).__name__}: {error})"
    return None


def _prepare_environment() -> None:
    """Settings that vLLM reads while it is imported; the user's own values win, except for the first."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine must share this process to take weights directly
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextmanager
def _caller_undisturbed() -> Iterator[None]:
    """Keep the caller's random state and torch functions: building an engine seeds everything and patches torch."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # type: ignore[assignment]  # vLLM puts a function that only warns there
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


class VllmEngine:
    """A :class:`~align.inference.protocol.RolloutEngine` around one ``vllm.LLM``."""

    name = "vllm"

    def __init__(
        self,
        model_dir: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        config: EngineConfig,
        max_length: int,
        seed: int,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Start an engine for sequences of at most ``max_length`` tokens, prompt and response together."""
        self.watchdog = watchdog or Watchdog(self.name, config.timeout)
        _prepare_environment()
        with _caller_undisturbed():  # the first import of transformers' tokenizers draws random numbers
            self.tokenizer = load_tokenizer(model_dir)
        self.eos = int(self.tokenizer.eos_token_id)
        self.names = weight_names(model_dir)
        self.dtype = dtype
        memory: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory, "enable_sleep_mode": config.sleep}
        if device.type == "cpu":
            memory = {
                "kv_cache_memory_bytes": int(config.cpu_kv_cache_gb * 2**30),
                "block_size": 32,
                # A prompt read in parts makes vLLM wind its request's generator back, which a CPU generator cannot do.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(CPU_STEP_TOKENS, max_length),
            }
        with self.watchdog.watch("start"), _caller_undisturbed():
            from vllm import LLM

            self.llm = LLM(
                model=str(model_dir),
                trust_remote_code=False,
                dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
                max_model_len=max_length,
                max_num_seqs=config.batch_size,
                enforce_eager=not config.compile,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # or the checkpoint's own top-k and penalties would creep in
                enable_prefix_caching=True,
                disable_log_stats=True,
                seed=seed,
                **memory,
            )
        self.sleep = Sleep(self.llm, memory.get("enable_sleep_mode", False))
        self.runner = model_runner(self.llm)
        notice_steps(self.llm, self.watchdog.progress)
        self.adapter = stored_adapter(self.runner, model_dir, dtype)
        self.tied = bool(getattr(self.llm.model_config.hf_config, "tie_word_embeddings", False))
        if device.type == "cpu":
            install_sampler(self.runner)

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """See the protocol."""
        from vllm import SamplingParams

        requests = [(index, sample) for index in range(len(prompts)) for sample in range(sampling.n)]
        params = [
            SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.request_seed(index, sample),
                stop_token_ids=[self.eos],
                ignore_eos=True,  # only our end token stops; configs of some models name others
                logprobs=0,
                detokenize=False,
            )
            for index, sample in requests
        ]
        outputs = self._run("generate", [prompts[index] for index, _ in requests], params, on_progress)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        responses: list[list[Response]] = [[] for _ in prompts]
        for (index, _), output, ids, text in zip(requests, outputs, tokens, texts, strict=True):
            logprobs = [
                float(found[token].logprob) for token, found in zip(ids, output.outputs[0].logprobs, strict=True)
            ]
            responses[index].append(Response(ids, logprobs, ids[-1] == self.eos, text))
        return responses

    def _run(self, call: str, prompts: list[list[int]], params: Any, on_progress: Progress | None = None) -> list[Any]:
        total = len(prompts)
        bar: Any = False
        if on_progress is not None:
            # vLLM calls it twice: around the iterable of requests, which passes through, and for the bar itself.
            bar = lambda it=None, **_: _Bar(total, on_progress) if it is None else it  # noqa: E731
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        with self.watchdog.watch(call), torch.inference_mode(), _caller_undisturbed():
            self.sleep.wake(WEIGHTS, CACHE)
            outputs: list[Any] = self.llm.generate(inputs, params, use_tqdm=bar)  # type: ignore[arg-type]
            if call == "generate":
                self.sleep.fall()
            return outputs

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See the protocol."""
        seen: set[str] = set()
        with self.watchdog.watch("load_weights"):
            with torch.no_grad(), _caller_undisturbed():
                self.sleep.wake(WEIGHTS)
                self.runner.reload_weights(weights_iterator=self._complete(weights, seen))
            refuse_missing(self.names, seen)
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache across a change of weights: requests still hold blocks")

    def _complete(self, weights: Iterable[tuple[str, torch.Tensor]], seen: set[str]) -> Iterator[tuple[str, Any]]:
        """Every weight with the tied head, noting in ``seen`` what came."""
        for name, tensor in with_tied_head(weights, self.tied):
            seen.add(name)
            self.watchdog.progress()
            if self.adapter is not None and name in self.adapter.weights:
                self.adapter.take({name: tensor})
            else:
                yield name, tensor.detach()

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """See the protocol. ``temperature`` must be 1: vLLM scores given tokens before temperature."""
        if temperature != 1:
            raise ValueError("vLLM gives log-probabilities of given tokens at temperature 1 only")
        from vllm import SamplingParams

        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        found = []
        for row, prompt, output in zip(rows, prompts, self._run("score_tokens", rows, params), strict=True):
            scores = zip(row[len(prompt) :], output.prompt_logprobs[len(prompt) :], strict=True)
            found.append([float(given[token].logprob) for token, given in scores])
        return found

    def close(self) -> None:
        """See the protocol. A second engine in this process is not to be counted on."""
        llm, self.llm, self.runner = self.llm, None, None  # type: ignore[assignment]
        if llm is not None:
            with self.watchdog.watch("close"), _caller_undisturbed():
                llm.llm_engine.engine_core.shutdown()


class _Bar:
    """What vLLM needs of a progress bar, passed on to a callback."""

    format_dict: dict[str, float] = {"elapsed": 1.0}  # noqa: RUF012  # read by vLLM for rates nobody sees
    postfix = ""

    def __init__(self, total: int, on_progress: Progress) -> None:
        self.total, self.n, self.on_progress = total, 0, on_progress

    def update(self, count: int = 1) -> None:
        """``count`` more requests are finished."""
        self.n += count
        self.on_progress(self.n, self.total)

    def refresh(self) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        """Nothing to close."""
