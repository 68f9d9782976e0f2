"""Rollouts by vLLM in the trainer's process, with vLLM's sleep mode on a shared GPU.

There is one engine per process: ``load_weights`` puts another policy into it. Calls to what is not public in vLLM are
in ``vllm_internals.py``. Leaves out servers, tensor parallelism and LoRA requests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.config.runtime import EngineConfig
from align.config.runtime.rollouts import CPU_STEP_TOKENS
from align.inference.protocol import Progress, Response, Sampling, Session, TurnRequest, Watchdog, check_idle
from align.inference.transformers import pick_tokens
from align.inference.vllm_internals import (
    ENGINE_MODULES,
    Steps,
    VllmChanged,
    cpu_block_size,
    model_runner,
    record_experts,
    runs_by_transformers,
    stored_adapter,
    why_model_unsupported,
)
from align.inference.weights import (
    HeldBase,
    Weights,
    needs_tied_head,
    refuse_missing,
    weight_names,
    with_stored_names,
    with_tied_head,
)
from align.models.compute.processes import empty_caches
from align.models.fast.stateful_layers import carries_state
from align.models.loading import load_tokenizer
from align.models.pretrained import open_config
from align.patches.vllm import (
    draw_once_per_row,
    flatten_rotary,
    keep_thread_count,
    keep_transformers_classes,
    reload_on_cpu,
    use_cpu_norms,
)
from align.pipeline.process_limits import resume_collections

WEIGHTS = "weights"
CACHE = "kv_cache"
"""vLLM's tags of the memory that sleeps."""


def why_unusable() -> str | None:
    """Say why vLLM cannot be used in this process; None when it can. Imports it."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    _prepare_environment()
    try:
        with _preserve_global_state():  # even the import draws random numbers
            import vllm  # noqa: F401
    except Exception as error:  # a broken build fails in many ways
        return f"vLLM does not import ({type(error).__name__}: {error})"
    return None


def import_engine() -> None:
    """Import what an engine imports when it is opened, for the processes that are forked from this one.

    Raises ``RuntimeError`` where vLLM cannot be used, and ``ImportError`` if any of its modules has moved.
    """
    obstacle = why_unusable()
    if obstacle is not None:
        raise RuntimeError(obstacle)
    with _preserve_global_state():
        for module in ENGINE_MODULES:
            importlib.import_module(module)


def why_model_unusable(model_dir: Path, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Say why vLLM cannot run a checkpoint's model on a device, in a type; None when it can. vLLM must be usable."""
    with _preserve_global_state():  # vLLM's description of a model seeds every generator
        return why_model_unsupported(model_dir, device, dtype)


def _prepare_environment() -> None:
    """Set the variables that vLLM reads while it is imported. The user's own values win, except for the first."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine must share this process to receive weights directly
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextmanager
def _preserve_global_state() -> Iterator[None]:
    """Restore random states and torch settings afterwards: building an engine seeds everything and patches torch."""
    # The trainer's draws must not depend on the engine that samples for it.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    grad = torch.is_grad_enabled()
    dtype = torch.get_default_dtype()
    try:
        with keep_thread_count():
            yield
    finally:
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
        with _preserve_global_state():  # the first import of transformers' tokenizers draws random numbers
            self.tokenizer = load_tokenizer(model_dir)
        self.eos = int(self.tokenizer.eos_token_id)
        # A change of weights must bring all of these.
        self.names = weight_names(model_dir)
        self.model_dir = model_dir
        self.dtype = dtype
        self.max_length = max_length
        self.compiles = config.compile
        memory: dict[str, Any] = {"gpu_memory_utilization": config.gpu_share, "enable_sleep_mode": config.sleep}
        memory["enable_prefix_caching"] = True
        with self.watchdog.watch("start"), _preserve_global_state():
            from vllm import LLM

            resume_collections()
            if runs_by_transformers(model_dir):
                keep_transformers_classes()
            if device.type == "cpu":
                memory = _cpu_options(model_dir, config, dtype, max_length)
            self.llm = LLM(
                model=str(model_dir),
                trust_remote_code=False,
                dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
                max_model_len=max_length,
                max_num_seqs=config.batch_size,
                enforce_eager=not config.compile,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # or the checkpoint's own top-k and penalties would creep in
                disable_log_stats=True,
                seed=seed,
                **memory,
            )
        self.session: Session | None = None
        """The session that is open."""
        self.sleep_mode = SleepMode(self.llm, memory.get("enable_sleep_mode", False))
        self.runner = model_runner(self.llm)
        self.steps = Steps(self.llm, self.watchdog.progress, max_length)
        self.adapter = stored_adapter(self.runner, model_dir, dtype)
        self.tied = needs_tied_head(self.llm.model_config.hf_config)
        self.held = HeldBase()
        if device.type == "cpu":
            draw_once_per_row(self.runner, pick_tokens)
            use_cpu_norms()
            flatten_rotary(self.runner.model)

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """Return sampled responses, as the protocol has it."""
        requests = [
            TurnRequest(index, prompts[index], sampling.max_tokens, sampling.request_seed(index, sample))
            for index in range(len(prompts))
            for sample in range(sampling.n)
        ]
        params = [self.sampling_params(request, sampling.temperature, sampling.top_p) for request in requests]
        # Outputs come back in the order of the requests, whatever order vLLM finished them in.
        outputs = self._run("generate", [request.prompt for request in requests], params, on_progress)
        responses = self.responses(outputs)
        return [responses[index * sampling.n : (index + 1) * sampling.n] for index in range(len(prompts))]

    def sampling_params(self, request: TurnRequest, temperature: float, top_p: float) -> Any:
        """Return vLLM's ``SamplingParams`` of one response."""
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=request.max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=request.seed,
            stop_token_ids=[self.eos],
            ignore_eos=True,  # only our end token stops; configs of some models name others
            logprobs=0,
            detokenize=False,
        )

    def responses(self, outputs: list[Any]) -> list[Response]:
        """Return a response for each of vLLM's outputs."""
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        responses = []
        for output, ids, text in zip(outputs, tokens, texts, strict=True):
            candidates = output.outputs[0].logprobs  # one dictionary per token, of which the sampled one counts
            logprobs = [float(entry[token].logprob) for token, entry in zip(ids, candidates, strict=True)]
            responses.append(Response(ids, logprobs, ids[-1] == self.eos, text))
        return responses

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Watch a call into vLLM, and keep the caller's random states and torch settings as they are."""
        with self.watchdog.watch(name), torch.inference_mode(), _preserve_global_state():
            yield

    def _run(
        self, call: str, prompts: list[list[int]], params: list[Any], on_progress: Progress | None = None
    ) -> list[Any]:
        """Run one request per prompt to its end, and return their outputs in the order of the prompts."""
        check_idle(self.session, call)
        outputs: dict[str, Any] = {}
        with self.call(call):
            self.sleep_mode.wake(WEIGHTS, CACHE)
            names = [self.steps.add(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
            while len(outputs) < len(names):
                ended = self.steps.step()
                # ``Steps.add`` cuts vLLM's names. If vLLM forms them in another way, outputs would be lost here.
                if not ended.keys() <= set(names):
                    raise VllmChanged("name of a request")
                outputs |= ended
                if ended and on_progress is not None:
                    on_progress(len(outputs), len(names))
            if call == "generate":
                self.sleep_mode.sleep()
        return [outputs[name] for name in names]

    def load_weights(self, weights: Weights) -> None:
        """Replace the policy's weights in the live model, and drop every cached prefix.

        Each tensor has the shape that the checkpoint gives its name; vLLM fuses them into its own. Of
        ``AdaptedWeights`` on the base that the model has, only layers with an adapter are replaced.
        """
        check_idle(self.session, "load_weights")
        loaded: set[str] = set()
        with self.watchdog.watch("load_weights"), self.held.loading(weights) as needed:
            with torch.no_grad(), _preserve_global_state():
                self.sleep_mode.wake(WEIGHTS)
                with reload_on_cpu(self.runner.model):
                    self.runner.reload_weights(weights_iterator=self._complete(needed, loaded))
            if needed is weights:
                refuse_missing(self.names, loaded)
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache across a change of weights: requests still hold blocks")

    def _complete(self, weights: Weights, loaded: set[str]) -> Iterator[tuple[str, Any]]:
        """Yield the weights with the tied head, and add their names to ``loaded``.

        A stored adapter's tensors go to its hooks instead.
        """
        # The watchdog hears of each tensor: a large model lasts longer than the timeout as a whole.
        for name, tensor in with_tied_head(with_stored_names(weights, self.model_dir, self.names), self.tied):
            loaded.add(name)
            self.watchdog.progress()
            if self.adapter is not None and name in self.adapter.weights:
                self.adapter.set_weights({name: tensor})
            else:
                yield name, tensor.detach()

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """Return log-probabilities of response tokens. ``temperature`` must be 1: vLLM scores before temperature."""
        if temperature != 1:
            raise ValueError("vLLM gives log-probabilities of given tokens at temperature 1 only")
        from vllm import SamplingParams

        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        # vLLM always samples at least one token, which is not read here.
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        outputs = self._run("score_tokens", rows, [params] * len(rows))
        logprobs = []
        for row, prompt, output in zip(rows, prompts, outputs, strict=True):
            start = len(prompt)
            entries = zip(row[start:], output.prompt_logprobs[start:], strict=True)
            logprobs.append([float(entry[token].logprob) for token, entry in entries])
        return logprobs

    def token_experts(self, rows: list[list[int]]) -> list[torch.Tensor] | None:
        """Return the experts of each row's tokens, (L, T, k) for L layers; None for a compiled model."""
        if self.compiles:
            return None
        experts = []
        for row in rows:
            # One request at a time, so the choices of a step belong to its tokens; prompt log-probabilities make vLLM
            # compute tokens that are in its prefix cache as well.
            with record_experts(self.runner.model) as choices:
                self.score_tokens([row[:1]], [row[1:]], 1.0)
            experts.append(torch.stack([torch.cat(layer)[: len(row)] for layer in choices.values()]))
        return experts

    def close(self) -> None:
        """Free the model and the cache. A second engine in this process may fail to start."""
        llm, self.llm, self.runner = self.llm, None, None  # type: ignore[assignment]
        if llm is not None:
            with self.watchdog.watch("close"), _preserve_global_state():
                llm.llm_engine.engine_core.shutdown()


def _cpu_options(model_dir: Path, config: EngineConfig, dtype: torch.dtype, max_length: int) -> dict[str, Any]:
    """Return vLLM's options of memory, batches and caches on a CPU."""
    return {
        "kv_cache_memory_bytes": int(config.cpu_kv_cache_gb * 2**30),
        # A prompt read in parts makes vLLM wind its request's generator back, which a CPU generator cannot do.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_STEP_TOKENS, max_length),
        "block_size": cpu_block_size(model_dir, dtype, max_length),
        # vLLM caches states of prefixes only with prompts read in parts.
        "enable_prefix_caching": not carries_state(open_config(model_dir)),
    }


class SleepMode:
    """vLLM's sleep mode: lends a GPU's memory to the trainer between calls to an engine on the same GPU.

    Asleep, the engine keeps its weights in the machine's memory and no keys and values. It sleeps once responses are
    done; the next call wakes what it needs. A change of weights wakes only the weights, so the cache needs no
    memory while the trainer merges adapters. Leaves out level 2, which drops the weights: the stages ``sample`` and
    ``evaluate`` continue with the same ones. Without ``enabled`` the engine is always awake.
    """

    def __init__(self, llm: Any, enabled: bool) -> None:
        self.llm = llm
        self.enabled = enabled
        self.asleep: list[str] = []
        """Tags that sleep."""
        self.make_room: Callable[[], None] = empty_caches
        """Frees memory of the device before a part wakes; by default what torch keeps for itself."""

    def sleep(self) -> None:
        """Free the memory, if all of it is awake. No request may be in flight."""
        if self.enabled and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = [WEIGHTS, CACHE]

    def sleep_all(self) -> None:
        """Free the memory also if only a part is awake."""
        if WEIGHTS not in self.asleep:
            self.wake(CACHE)
            self.sleep()

    def wake(self, *tags: str) -> None:
        """Wake the ``tags`` that sleep."""
        for tag in [name for name in self.asleep if name in tags]:
            self.make_room()
            self.llm.wake_up(tags=[tag])
            self.asleep.remove(tag)
