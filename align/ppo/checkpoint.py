"""What a PPO checkpoint holds beside the Trainer's files, and which one a killed run resumes from.

``model.safetensors`` has every trained tensor of policy and critic in float32; frozen ones come from the models the
run starts from. ``ppo_state.json`` has the KL controller, the totals, and the fields that decide the data order. The
Trainer adds optimizer, scheduler, random states and ``trainer_state.json``. A checkpoint is written under another name
and renamed when whole, so one that a kill cut short is never taken for one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import rotate_checkpoints

from align.errors import UserError

WEIGHTS = "model.safetensors"
STATE = "ppo_state.json"
DRAFT = ".draft"


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write every parameter that is trained; tied ones once."""
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / WEIGHTS, metadata={"format": "pt"})


def load_trained(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's tensors into the live model. Raises ``UserError`` unless names and shapes are the same."""
    stored = load_file(folder / WEIGHTS)
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differing = sorted(stored.keys() ^ live.keys()) or [n for n, t in stored.items() if t.shape != live[n].shape]
    if differing:
        raise UserError(
            f"{folder} was written by a run with another model, tuning or critic: {differing[0]} differs "
            f"({len(differing)} in all). Resume with the settings it was started with, or start anew."
        )
    with torch.no_grad():
        for name, tensor in stored.items():
            live[name].copy_(tensor)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``ppo_state.json``; Python's floats survive JSON exactly."""
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def load_state(folder: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Read it back. Raises ``UserError`` when the run's data order would differ from the checkpoint's."""
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"{folder} has no {STATE}: it is not a checkpoint of PPO. Point at another, or start anew.")
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, value in state["fingerprint"].items():
        if fingerprint.get(name) != value:
            raise UserError(
                f"{folder} was written with {name} {value}, this run has {fingerprint.get(name)}; the resumed run "
                "would not continue it. Set it back, or start anew."
            )
    return state


def clear(draft: Path, accelerator: Any) -> None:
    """Make ``draft`` an empty folder, once for all processes."""
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    accelerator.wait_for_everyone()


def publish(draft: Path, output_dir: Path, limit: int | None) -> None:
    """Move the checkpoint in ``draft`` to its place, then delete the oldest beyond ``limit``."""
    (folder,) = draft.glob("checkpoint-*")
    target = output_dir / folder.name
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    shutil.rmtree(draft, ignore_errors=True)
    rotate_checkpoints(str(output_dir), save_total_limit=limit)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole ``checkpoint-<step>`` in ``output_dir``, or None; leftovers of a killed save are removed."""
    if not output_dir.is_dir():
        return None
    shutil.rmtree(output_dir / DRAFT, ignore_errors=True)
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and all((folder / name).is_file() for name in (WEIGHTS, STATE, "trainer_state.json")):
            found.append((int(step), folder))
    return max(found)[1] if found else None
