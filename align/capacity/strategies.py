"""In which ways devices can work on one model together, named as ``runtime.launch`` names them. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.config.launch import LaunchConfig

Name = Literal["single", "ddp", "fsdp2", "deepspeed"]
Offload = Literal["none", "optimizer", "all"]


@dataclass(frozen=True)
class Strategy:
    """How devices share a model, and what they keep elsewhere or compute twice."""

    name: Name
    zero_stage: int = 0
    """Of deepspeed: 1 shares out AdamW's state, 2 the gradients too, 3 the weights too."""
    checkpointing: bool = False
    """Whether activations are computed again instead of being kept."""
    offload: Offload = "none"
    """What waits in the machine's own memory: AdamW's state, or weights, gradients and that."""

    @property
    def label(self) -> str:
        """``fsdp2, offload, checkpointing``."""
        name = f"deepspeed zero-{self.zero_stage}" if self.name == "deepspeed" else self.name
        parts = [name] if self.name != "single" else ["one device"]
        parts += [f"offload {self.offload}"] * (self.offload != "none") + ["checkpointing"] * self.checkpointing
        return ", ".join(parts)

    @property
    def shares_weights(self) -> bool:
        """Whether a device holds a part of the weights only."""
        return self.name == "fsdp2" or self.zero_stage == 3

    @property
    def shares_gradients(self) -> bool:
        """Whether a device keeps a part of the gradients only."""
        return self.shares_weights or self.zero_stage == 2

    @property
    def shares_optimizer(self) -> bool:
        """Whether a device holds a part of AdamW's state only."""
        return self.name in ("fsdp2", "deepspeed")


def of_launch(launch: LaunchConfig, devices: int, checkpointing: bool) -> Strategy:
    """The way that ``runtime.launch`` asks for."""
    if devices == 1:
        return Strategy("single", checkpointing=checkpointing)
    if launch.strategy == "ddp":
        return Strategy("ddp", checkpointing=checkpointing)
    if launch.strategy == "fsdp2":
        return Strategy("fsdp2", 0, checkpointing, "all" if launch.fsdp.offload else "none")
    zero = launch.deepspeed
    offload: Offload = "all" if zero.offload_parameters else "optimizer" if zero.offload_optimizer else "none"
    return Strategy("deepspeed", zero.stage, checkpointing, offload)


def candidates(devices: int, checkpointing: bool) -> list[Strategy]:
    """Every way that is tried, simplest first; ``checkpointing`` where the config asks for it already."""
    ways: list[tuple[Name, int, Offload]] = [("single", 0, "none")] if devices == 1 else [
        ("ddp", 0, "none"), ("deepspeed", 1, "none"), ("deepspeed", 2, "none"), ("fsdp2", 0, "none"),
        ("deepspeed", 3, "none"),
    ]  # fmt: skip
    ways += [("deepspeed", 2, "optimizer"), ("fsdp2", 0, "all"), ("deepspeed", 3, "all")]
    options = (True,) if checkpointing else (False, True)
    return [Strategy(name, stage, again, offload) for name, stage, offload in ways for again in options]
