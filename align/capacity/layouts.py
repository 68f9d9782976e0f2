"""Layouts of a stage on devices: strategies of training and placements of engines, named as ``runtime`` names them.

A stage that trains runs by a ``Strategy`` (``runtime.launch``). One that samples runs by an ``EngineLayout``: one
engine in the stage's own process, vLLM servers on one machine (``runtime.rollouts``), servers that run already, or an
engine on each of several devices of a Ray cluster (``runtime.executor.samplers``). Never imports torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from align.capacity.hardware import Hardware
from align.capacity.memory import resolve_engine
from align.config.launch import LaunchConfig
from align.config.runtime import Runtime
from align.config.vllm_servers import RolloutsConfig
from align.models.architecture import Architecture

StrategyName = Literal["single", "ddp", "fsdp2", "deepspeed"]
Offload = Literal["none", "optimizer", "all"]
EngineName = Literal["transformers", "vllm"]
Placement = Literal["process", "servers", "samplers", "external", "none"]

OFFLOADED: dict[Offload, dict[str, bool]] = {
    "none": {},
    "optimizer": {"offload_optimizer": True},
    "all": {"offload_optimizer": True, "offload_parameters": True},
}
"""Settings of DeepSpeed for what is offloaded."""
GPUS_OF_A_MACHINE = (2, 4, 8)
"""Devices of one machine that a remedy may ask for."""


@dataclass(frozen=True)
class Strategy:
    """The way in which devices share a model in training, with what they offload and recompute."""

    name: StrategyName
    zero_stage: int = 0
    """Stage of deepspeed: 1 shards AdamW's state, 2 the gradients too, 3 the weights too."""
    checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""
    offload: Offload = "none"
    """What is kept in the machine's own memory: AdamW's state, or weights, gradients and AdamW's state."""

    @property
    def label(self) -> str:
        """Name for the table, such as ``fsdp2, offload all, checkpointing``."""
        if self.name == "single":
            parts = ["one device"]
        elif self.name == "deepspeed":
            parts = [f"deepspeed zero-{self.zero_stage}"]
        else:
            parts = [self.name]
        if self.offload != "none":
            parts.append(f"offload {self.offload}")
        if self.checkpointing:
            parts.append("checkpointing")
        return ", ".join(parts)

    @property
    def shards_weights(self) -> bool:
        """True if each device holds only a shard of the weights."""
        return self.name == "fsdp2" or self.zero_stage == 3

    @property
    def shards_gradients(self) -> bool:
        """True if each device keeps only a shard of the gradients."""
        return self.shards_weights or self.zero_stage == 2

    @property
    def shards_optimizer(self) -> bool:
        """True if each device holds only a shard of AdamW's state."""
        return self.name in ("fsdp2", "deepspeed")

    def to_json(self, batch: int, largest: int) -> dict[str, Any]:
        """Return the strategy and its micro-batches for ``--json``."""
        return {
            "strategy": self.name,
            "zero_stage": self.zero_stage or None,
            "gradient_checkpointing": self.checkpointing,
            "offload": self.offload,
            "micro_batch_size": batch or None,
            "largest_micro_batch": largest or None,
        }


def requested_strategy(launch: LaunchConfig, devices: int, checkpointing: bool) -> Strategy:
    """Return the strategy that ``runtime.launch`` names."""
    if devices == 1:
        return Strategy("single", checkpointing=checkpointing)
    if launch.strategy == "ddp":
        return Strategy("ddp", checkpointing=checkpointing)
    if launch.strategy == "fsdp2":
        return Strategy("fsdp2", 0, checkpointing, "all" if launch.fsdp.offload else "none")
    zero = launch.deepspeed
    offload: Offload = "none"
    if zero.offload_parameters:
        offload = "all"
    elif zero.offload_optimizer:
        offload = "optimizer"
    return Strategy("deepspeed", zero.stage, checkpointing, offload)


def launch_of(strategy: Strategy, hardware: Hardware) -> LaunchConfig:
    """Return the block ``runtime.launch`` that asks for a strategy on several devices."""
    block: dict[str, Any] = {"processes": hardware.per_node, "nodes": hardware.nodes, "strategy": strategy.name}
    if strategy.name == "fsdp2" and strategy.offload != "none":
        block["fsdp"] = {"offload": True}
    if strategy.name == "deepspeed":
        block["deepspeed"] = {"stage": strategy.zero_stage} | OFFLOADED[strategy.offload]
    return LaunchConfig.model_validate(block)


def candidate_strategies(devices: int, checkpointing: bool) -> list[Strategy]:
    """Return every strategy to try, simplest first; ``checkpointing`` if the config already asks for it."""
    # A single process shards and offloads nothing.
    settings: list[tuple[StrategyName, int, Offload]] = [("single", 0, "none")]
    if devices > 1:
        # Offloading is slower, so it comes last and matters only where nothing else fits.
        settings = [
            ("ddp", 0, "none"),
            ("deepspeed", 1, "none"),
            ("deepspeed", 2, "none"),
            ("fsdp2", 0, "none"),
            ("deepspeed", 3, "none"),
            ("deepspeed", 2, "optimizer"),
            ("fsdp2", 0, "all"),
            ("deepspeed", 3, "all"),
        ]
    checkpointed = (True,) if checkpointing else (False, True)
    return [Strategy(name, stage, flag, offload) for name, stage, offload in settings for flag in checkpointed]


@dataclass(frozen=True)
class EngineLayout:
    """Number and devices of the engines that sample for a stage."""

    placement: Placement
    engine: EngineName
    engines: int = 1
    tensor_parallel: int = 1
    """Devices that share the weights of one engine."""
    engines_per_device: int = 1
    """Engines with a shard on the fullest device."""
    obstacle: str = ""
    """Why the layout is impossible for any model; empty if it is possible."""

    @property
    def label(self) -> str:
        """Name for the table, such as ``4 servers, tensor_parallel 2``."""
        plural = "s" if self.engines > 1 else ""
        parallel = f", tensor_parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return {
            "process": f"one engine ({self.engine})",
            "servers": f"{self.engines} server{plural}{parallel}",
            "samplers": f"{self.engines} sampler{plural} of Ray ({self.engine})",
            "external": "servers that run already",
            "none": "one device",
        }[self.placement]

    @property
    def setting(self) -> str:
        """YAML that selects the layout; empty if a stage takes it by default."""
        if self.placement != "servers":
            return ""
        parallel = f", tensor_parallel: {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return f"runtime.rollouts: {{servers: {self.engines}{parallel}}}"

    def to_json(self, batch: int, largest: int) -> dict[str, Any]:
        """Return the engines and the sequences that each decodes at a time for ``--json``."""
        return {
            "engine": self.engine,
            "engines": self.engines,
            "tensor_parallel": self.tensor_parallel,
            "sequences_at_once": batch or None,
            "largest_at_once": largest or None,
        }


def local_engine(runtime: Runtime) -> EngineName:
    """Return the engine of the stage's own process, with ``auto`` resolved for this machine."""
    without_servers = runtime.model_copy(update={"rollouts": RolloutsConfig()})
    return "transformers" if resolve_engine(without_servers)[0] == "transformers" else "vllm"


def requested_layout(runtime: Runtime, hardware: Hardware) -> EngineLayout | None:
    """Return the layout that the run's settings name, or None if they leave it open."""
    rollouts, samplers = runtime.rollouts, runtime.samplers
    if samplers.count:
        # Rounded up: the fullest device decides.
        per_device = -(-samplers.count // hardware.devices)
        return EngineLayout("samplers", local_engine(runtime), samplers.count, engines_per_device=per_device)
    if rollouts.addresses:
        return EngineLayout("external", "vllm", len(rollouts.addresses))
    if rollouts.servers:
        return _server_layout(rollouts, hardware)
    if runtime.engine.name == "transformers":
        return EngineLayout("process", "transformers")
    return None


def _server_layout(rollouts: RolloutsConfig, hardware: Hardware) -> EngineLayout:
    """Return the requested servers on the GPUs that they use; servers share GPUs if there are too few."""
    gpus, size = hardware.per_node, rollouts.tensor_parallel
    # how many servers use each GPU
    usage = Counter(gpu for server in range(rollouts.servers) for gpu in rollouts.gpus_of(server, gpus))
    obstacle = ""
    if size > gpus:
        obstacle = f"tensor_parallel {size} needs as many devices of one machine, which has {gpus}"
    elif max(usage) >= gpus:
        obstacle = f"runtime.rollouts.gpus names GPU {max(usage)}, and a machine has {gpus} (0 to {gpus - 1})"
    return EngineLayout("servers", "vllm", rollouts.servers, size, max(usage.values()), obstacle)


def candidate_layouts(runtime: Runtime, hardware: Hardware) -> list[EngineLayout]:
    """Return every layout to try, simplest first: one engine, then servers of 1, 2, 4, … devices on one machine."""
    layouts = [EngineLayout("process", local_engine(runtime))]
    if hardware.per_node == 1:
        return layouts
    size = 1
    while size <= hardware.per_node:
        # Powers of two, since heads rarely divide by anything else.
        layouts.append(EngineLayout("servers", "vllm", hardware.per_node // size, size))
        size *= 2
    return layouts


def tensor_parallel_obstacle(model: Architecture, devices: int) -> str:
    """Say why vLLM cannot split a model among so many devices; empty if it can."""
    query_heads, key_heads = model.heads
    if devices == 1:
        return ""
    if not query_heads:
        return "the model's number of heads is not known, so tensor_parallel cannot be planned"
    if query_heads % devices or (key_heads % devices and devices % key_heads):
        heads = f"{query_heads} heads ({key_heads} of keys)"
        return f"its {heads} do not divide among {devices} devices (tensor_parallel)"
    return ""


def tensor_parallel_bytes(
    model: Architecture, weights: int, cache: int, bytes_per_weight: int, devices: int
) -> tuple[int, int]:
    """Return the bytes of an engine's weights and of its cache on each of ``devices`` devices.

    Norms are on every device. With fewer key heads than devices, several devices hold the same head.
    """
    if devices == 1:
        return weights, cache
    key_heads = model.heads[1]
    # With more devices than key heads, each device keeps a copy of one head: weights and cache divide less.
    head_share = max(1, key_heads // devices) / key_heads
    norms = bytes_per_weight * (model.layers * model.vectors + model.last_norm)
    # Projections of keys and values: what a device holds of them beyond an even share.
    repeated = 2 * bytes_per_weight * model.layers * model.hidden * model.key_value_width * (head_share - 1 / devices)
    return round((weights - norms) / devices + norms + repeated), round(cache * head_share)
