"""The type in which a stage with ``precision: auto`` computes. Imports torch only to measure, once per machine.

A stage keeps its type until it is done: a resumed attempt must give the bits that one attempt would have given, and a
stage that continues another must continue as that stage would have. All processes of a stage use the same type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from align.config.base import Precision
from align.config.launch import world_size
from align.config.runtime import Runtime
from align.config.stages.continue_from import CONTINUE
from align.models.compute_types import ProductSpeed, read_speed
from align.pipeline.pipeline import Pipeline
from align.pipeline.registry import load_object
from align.store.artifacts import Artifact
from align.store.json_files import DamagedFile, read_sealed, write_sealed

if TYPE_CHECKING:
    from align.runner.plan import Step

PRECISION_FILE = "precision.json"
"""In the stage's partial folder: the type of its first attempt."""
MEASUREMENT, DEVICE, BROADCAST = (
    "align.models.product_speed:product_speed",
    "align.models.threads:device_of",
    "align.models.processes:broadcast",
)
"""Loaded by name, because they import torch."""


class StagePrecision(BaseModel):
    """The content of ``precision.json``."""

    precision: Precision


def choose_precision(folder: Path, config: Any, inputs: Mapping[str, Any], runtime: Runtime) -> Precision:
    """Return the type that ``precision: auto`` stands for in the stage of ``folder``.

    In several processes the first one chooses, and all of them must call this.
    """
    if getattr(config, "precision", None) != "auto":
        return "bfloat16"  # not used: the config says the type, or the stage multiplies nothing

    def choose() -> Precision:
        first_attempt = _read(folder)
        if first_attempt is not None:
            return first_attempt
        precision = _precision_of(inputs.get(CONTINUE)) or measured_speed(runtime).faster
        write_sealed(folder / PRECISION_FILE, {"precision": precision})
        return precision

    precision: Precision = load_object(BROADCAST)(choose) if world_size() > 1 else choose()
    return precision


def measured_speed(runtime: Runtime) -> ProductSpeed:
    """Return the speed of products on the stage's device; torch is imported if it was not measured before."""
    speed = read_speed() if runtime.device == "cpu" else None
    if speed is None:
        speed = load_object(MEASUREMENT)(load_object(DEVICE)(runtime))
    return speed


def emulation_warning(speed: ProductSpeed) -> str:
    """Return what ``precision: bfloat16`` costs on a device that emulates it."""
    return (
        f"this processor emulates bfloat16 ({speed.describe()}): products take "
        f"{speed.float32 / speed.bfloat16:.0f} times as long. Set `precision: auto`"
    )


def plan_notes(pipeline: Pipeline, steps: Sequence[Step]) -> list[str]:
    """Return what ``precision`` means on this machine for the stages that a run would make."""
    planned = [step.node for step in steps if step.action in ("run", "resume")]
    on_cpu = [node for node in planned if not _uses_gpu(pipeline.runtimes[node.name])]
    settings = {node.name: getattr(node.config, "precision", None) for node in on_cpu}
    notes = []
    speed = read_speed()
    if "auto" in settings.values():
        if speed is None:
            notes.append("precision auto: this processor is measured when the first stage starts")
        else:
            notes.append(f"precision auto: {speed.faster} on this processor ({speed.describe()})")
    emulated = [name for name, setting in settings.items() if setting == "bfloat16"]
    if emulated and speed is not None and speed.emulates_bfloat16:
        notes.append(f"! {', '.join(emulated)}: {emulation_warning(speed)}.")
    return notes


def _uses_gpu(runtime: Runtime) -> bool:
    """Return True if the stage will run on a GPU, as far as one can tell without torch."""
    return runtime.device == "cuda" or (runtime.device == "auto" and Path("/dev/nvidiactl").exists())


def _read(folder: Path) -> Precision | None:
    try:
        return read_sealed(folder / PRECISION_FILE, StagePrecision).precision
    except (FileNotFoundError, DamagedFile):
        return None


def _precision_of(continued: Any) -> Precision | None:
    """Return the type that a finished stage computed in; None for older records and for no stage."""
    precision = continued.record.get("precision") if isinstance(continued, Artifact) else None
    return precision if precision in ("bfloat16", "float32") else None
