"""Devices with their memory, the notation ``4x8xh100``, strategies of training, and one way to fit a stage on devices.

Never imports torch.

The memory of a card is the memory that torch reports on it, which is less than its name says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from align.capacity.memory import CACHED_SEQUENCES
from align.config.runtime import HostPart
from align.config.runtime.launch import LaunchConfig
from align.config.validation import suggest
from align.errors import UserError
from align.pipeline.process_limits import usable_memory

GIB = 2**30
CPU = re.compile(r"cpu(-(?P<gib>[1-9]\d{0,4}))?")
NOTATION = re.compile(r"((?P<first>[1-9]\d{0,3})x)?((?P<second>[1-9]\d{0,3})x)?(?P<name>[a-z][a-z0-9-]*|\d{4}|\d{2}gb)")


@dataclass(frozen=True)
class Device:
    """One accelerator, or one machine's processor."""

    name: str
    memory: int
    """Bytes available to programs."""
    context: int = int(0.7 * GIB)
    """Bytes that the driver and the libraries need before any tensor."""
    host: int = 200 * GIB
    """Bytes of the machine's own memory for each device."""
    gpu: bool = True
    teraflops: float = 0.0
    """Peak of dense bfloat16 products in TFLOP/s, as its maker states it; 0 if it is not known."""

    @property
    def usable(self) -> int:
        """Bytes for tensors; 5 % of the memory stays free for fragmentation."""
        return int(0.95 * self.memory) - self.context


GIB_OF_CARDS = {
    "b200": 178.4,
    "h200": 139.8,
    "h100": 79.1,
    "a100-80": 79.2,
    "a100-40": 39.4,
    "l40s": 44.5,
    "l4": 22.0,
    "a10g": 22.0,
    "rtx4090": 23.5,
    "rtx3090": 23.6,
    "rtx4080": 15.7,
}
TERAFLOPS = {
    "b200": 2250,
    "h200": 989,
    "h100": 989,
    "a100-80": 312,
    "a100-40": 312,
    "l40s": 362,
    "l4": 121,
    "a10g": 70,
    "rtx4090": 165,
    "rtx3090": 71,
    "rtx4080": 97,
}
DEVICES = {name: Device(name, int(gib * GIB), teraflops=TERAFLOPS[name]) for name, gib in GIB_OF_CARDS.items()}
"""Cards by their name in ``--hardware``."""
ALIASES = {"a100": "a100-80", "4090": "rtx4090", "3090": "rtx3090", "4080": "rtx4080", "h100-80": "h100"}
ALIASES |= {"16gb": "rtx4080", "24gb": "rtx4090", "40gb": "a100-40", "80gb": "h100"}
"""Other names; ``24gb`` stands for a common card of that size."""


@dataclass(frozen=True)
class Hardware:
    """``nodes`` machines with ``per_node`` devices each."""

    device: Device
    nodes: int = 1
    per_node: int = 1

    @property
    def devices(self) -> int:
        """Number of devices on all machines."""
        return self.nodes * self.per_node

    @property
    def label(self) -> str:
        """Notation of the hardware, such as ``4x8xh100``."""
        if self.nodes > 1:
            return f"{self.nodes}x{self.per_node}x{self.device.name}"
        if self.per_node > 1:
            return f"{self.per_node}x{self.device.name}"
        return self.device.name

    def shared(self) -> Hardware:
        """Return the hardware with each process's share of a processor's memory; cards are not shared."""
        if self.device.gpu:
            return self
        share = self.device.memory // self.per_node
        return replace(self, device=replace(self.device, memory=share, host=share))

    def other_cards(self) -> list[Hardware]:
        """Return the same number of each other card, the smallest card first."""
        cards = sorted(DEVICES.values(), key=lambda device: device.memory)
        return [replace(self, device=card) for card in cards if card.name != self.device.name]


def parse_hardware(text: str) -> Hardware:
    """Parse ``cpu``, ``1xa100-40``, ``8xh100`` or ``4x8xh100`` (machines, devices of each); ``cpu-64`` has 64 GiB.

    Raises ``UserError`` for any other text.
    """
    match = NOTATION.fullmatch(text.strip().lower())
    name = match["name"] if match else text
    cpu = CPU.fullmatch(name)
    device = processor(cpu["gib"]) if cpu else DEVICES.get(ALIASES.get(name, name))
    if match is None or device is None:
        raise UserError(
            f"--hardware {text}: expected a number of devices and their name, such as 8xh100, 1xa100-40, cpu, or "
            f"4x8xh100 for four machines of eight.{suggest(name, [*DEVICES, *ALIASES, 'cpu'])}"
        )
    first = int(match["first"] or 1)
    second = match["second"]
    # ``8xh100`` is one machine with eight devices, ``4x8xh100`` four such machines.
    nodes, per_node = (first, int(second)) if second else (1, first)
    return Hardware(device, nodes, per_node).shared()


def processor(gib: str | None = None) -> Device:
    """Return this machine's processor; ``gib`` replaces the machine's memory."""
    memory = int(gib) * GIB if gib else usable_memory()
    name = "cpu" if gib is None else f"cpu-{gib}"
    return Device(name, memory, context=int(0.8 * GIB), host=memory, gpu=False)


# ---- strategies ----

StrategyName = Literal["single", "ddp", "fsdp2", "deepspeed"]
Offload = Literal["none", "optimizer", "all"]

OFFLOAD_SETTINGS: dict[Offload, dict[str, bool]] = {
    "none": {},
    "optimizer": {"offload_optimizer": True},
    "all": {"offload_optimizer": True, "offload_parameters": True},
}
"""Settings of DeepSpeed for what is offloaded."""
OFFLOADED_PARTS: dict[Offload, tuple[str, ...]] = {
    "none": (),
    "optimizer": ("optimizer",),
    "all": ("weights", "gradients", "optimizer"),
}
"""Parts of ``Memory`` that each ``Strategy.offload`` moves to the machine's own memory."""
ON_SEVERAL_DEVICES: list[tuple[StrategyName, int, Offload]] = [
    ("ddp", 0, "none"),
    ("deepspeed", 1, "none"),
    ("deepspeed", 2, "none"),
    ("fsdp2", 0, "none"),
    ("deepspeed", 3, "none"),
    # Offloading is slower, so it comes last and matters only if no other strategy fits.
    ("deepspeed", 2, "optimizer"),
    ("fsdp2", 0, "all"),
    ("deepspeed", 3, "all"),
]
"""Strategies to try on several devices, the simplest first."""


@dataclass(frozen=True)
class Strategy:
    """The way in which devices share a model in training, with what they offload and recompute."""

    name: StrategyName
    zero_stage: int = 0
    """Stage of deepspeed: 1 shards AdamW's state, 2 also the gradients, 3 also the weights."""
    checkpointing: bool = False
    """True if activations are recomputed in the backward pass."""
    offload: Offload = "none"
    """Contents of the machine's own memory: AdamW's state, or weights, gradients and AdamW's state."""
    host: tuple[HostPart, ...] = ()
    """On one device, the parts in the machine's own memory."""
    cached: int = CACHED_SEQUENCES
    """Most sequences for which an engine's cache has room."""

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
        if self.host:
            parts.append(f"{' and '.join(self.host)} in host memory")
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


def requested_strategy(
    launch: LaunchConfig, devices: int, *, checkpointing: bool, host: tuple[HostPart, ...]
) -> Strategy:
    """Return the strategy that ``runtime.launch`` names; on one device ``host`` is in the machine's memory."""
    if devices == 1:
        return Strategy("single", checkpointing=checkpointing, host=host)
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
        block["deepspeed"] = {"stage": strategy.zero_stage} | OFFLOAD_SETTINGS[strategy.offload]
    return LaunchConfig.model_validate(block)


def candidate_strategies(devices: int, *, checkpointing: bool, host: tuple[HostPart, ...]) -> list[Strategy]:
    """Return every strategy to try, simplest first; ``checkpointing`` if the config already asks for it."""
    checkpointed = (True,) if checkpointing else (False, True)
    if devices == 1:
        return [Strategy("single", checkpointing=flag, host=host) for flag in checkpointed]
    return [
        Strategy(name, stage, flag, offload) for name, stage, offload in ON_SEVERAL_DEVICES for flag in checkpointed
    ]


# ---- ways ----


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a stage on devices, with the bytes of the fullest device."""

    label: str
    """Name for the table."""
    batch: int
    """Rows of a device's micro-batch, or sequences that an engine decodes at a time; 0 if not even one fits."""
    largest: int
    """The largest ``batch`` that would fit, whatever the config asks for."""
    parts: dict[str, int]
    """Bytes on the fullest device, by purpose; for the smallest batch if none fits."""
    obstacle: str = ""
    """Reason if the way does not fit; empty if it fits."""
    not_counted: tuple[str, ...] = ()
    """Parts without a rule, which are missing in ``parts``; ``largest`` is 0 then."""

    @property
    def fits(self) -> bool:
        """True if no obstacle was found."""
        return not self.obstacle

    @property
    def peak(self) -> int:
        """Bytes on the fullest device, driver and libraries included."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Return everything in words and bytes."""
        return {
            "way": self.label,
            "peak": self.peak,
            "parts": self.parts,
            "fits": self.fits,
            "why_not": self.obstacle or None,
            "not_counted": list(self.not_counted),
        }


def largest_that_fits(fits: Callable[[int], bool], maximum: int) -> int:
    """Return the greatest number up to ``maximum`` for which ``fits`` holds; 0 for none.

    ``fits`` must be monotone: if it holds for a number, it holds for every smaller one.
    """
    if not fits(1):
        return 0
    # Double until it no longer fits, then bisect: low always fits, high does not.
    low = 1
    high = 2
    while high <= maximum and fits(high):
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return min(low, maximum)
