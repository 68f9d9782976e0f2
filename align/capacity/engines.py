"""In which ways engines can sample for a stage, named as ``runtime`` names them. Never imports torch.

What there is: one engine in the stage's own process, on one device; ``runtime.rollouts``, vLLM servers of
``tensor_parallel`` devices each, all on one machine; servers that run already; ``runtime.ray.samplers``, an engine on
each of several devices of a cluster. What a stage scores and reads afterwards is on its own process's device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from align.capacity.hardware import Hardware
from align.capacity.memory import engine_of
from align.config.runtime import Runtime
from align.config.vllm_servers import RolloutsConfig
from align.models.architecture import Architecture

Kind = Literal["process", "servers", "samplers", "elsewhere", "none"]
GPUS_OF_A_MACHINE = (2, 4, 8)
"""Devices of one machine that a remedy may ask for."""


@dataclass(frozen=True)
class EngineWay:
    """How many engines sample, on what."""

    kind: Kind
    engine: Literal["transformers", "vllm"]
    engines: int = 1
    parallel: int = 1
    """Devices that share the weights of one of them."""
    together: int = 1
    """Engines that have a part on the fullest device."""
    why_not: str = ""
    """What stands against it whatever the sizes; empty where nothing does."""

    @property
    def label(self) -> str:
        """``4 servers, tensor_parallel 2``."""
        several = "s" * (self.engines > 1)
        parallel = f", tensor_parallel {self.parallel}" if self.parallel > 1 else ""
        return {
            "process": f"one engine ({self.engine})",
            "servers": f"{self.engines} server{several}{parallel}",
            "samplers": f"{self.engines} sampler{several} of Ray ({self.engine})",
            "elsewhere": "servers that run already",
            "none": "one device",
        }[self.kind]

    @property
    def setting(self) -> str:
        """What to write for it, where it is not what a stage does by itself."""
        if self.kind != "servers":
            return ""
        parallel = f", tensor_parallel: {self.parallel}" if self.parallel > 1 else ""
        return f"runtime.rollouts: {{servers: {self.engines}{parallel}}}"


def engine_here(runtime: Runtime) -> Literal["transformers", "vllm"]:
    """The engine of the stage's own process: ``auto`` is what it comes to on this machine."""
    alone = runtime.model_copy(update={"rollouts": RolloutsConfig()})
    return "transformers" if engine_of(alone)[0] == "transformers" else "vllm"


def asked_for(runtime: Runtime, hardware: Hardware) -> EngineWay | None:
    """The way that the run's settings name, or None where they leave it open."""
    pool, samplers = runtime.rollouts, runtime.ray.samplers
    if samplers.count:
        most = -(-samplers.count // hardware.devices)
        return EngineWay("samplers", engine_here(runtime), samplers.count, together=most)
    if pool.addresses:
        return EngineWay("elsewhere", "vllm", len(pool.addresses))
    if pool.servers:
        return _servers(pool, hardware)
    if runtime.engine.name == "transformers":
        return EngineWay("process", "transformers")
    return None


def _servers(pool: RolloutsConfig, hardware: Hardware) -> EngineWay:
    """Servers as they are asked for, on the devices that they take; they share some where there are too few."""
    there, size = hardware.per_node, pool.tensor_parallel
    taken = Counter(gpu for number in range(pool.servers) for gpu in pool.gpus_of(number, there))
    why = ""
    if size > there:
        why = f"tensor_parallel {size} takes as many devices of one machine, which has {there}"
    elif max(taken) >= there:
        why = f"runtime.rollouts.gpus names GPU {max(taken)}, and a machine has {there} (0 to {there - 1})"
    return EngineWay("servers", "vllm", pool.servers, size, max(taken.values()), why)


def candidates(runtime: Runtime, hardware: Hardware) -> list[EngineWay]:
    """Every way that is tried, simplest first: one engine, then one machine's devices by one, two, four, … each."""
    found = [EngineWay("process", engine_here(runtime))]
    size = 1
    while size <= hardware.per_node:
        if hardware.per_node > 1:
            found.append(EngineWay("servers", "vllm", hardware.per_node // size, size))
        size *= 2
    return found


def cannot_be_parted(model: Architecture, devices: int) -> str:
    """Why so many devices cannot share a model, as vLLM does it; empty where they can."""
    heads, groups = model.heads
    if devices == 1:
        return ""
    if not heads:
        return "how many heads the model has is not known, so that tensor_parallel cannot be planned"
    if heads % devices or (groups % devices and devices % groups):
        return f"its {heads} heads ({groups} of keys) do not divide among {devices} devices (tensor_parallel)"
    return ""


def parted(model: Architecture, amount: int, cache: int, size: int, devices: int) -> tuple[int, int]:
    """A device's bytes of an engine's weights and of its cache; ``size`` is that of a weight.

    Norms stand on every device. Where there are fewer heads of keys than devices, several hold the same one.
    """
    if devices == 1:
        return amount, cache
    groups = model.heads[1]
    held = max(1, groups // devices) / groups  # share of the heads of keys and values that a device has
    norms = size * (model.layers * model.vectors + model.last_norm)
    again = 2 * size * model.layers * model.hidden * model.key_value_width * (held - 1 / devices)
    return round((amount - norms) / devices + norms + again), round(cache * held)
