"""What a PPO checkpoint holds beside the Trainer's files, and which one a killed run resumes from.

``model.safetensors`` has every trained tensor of policy and critic in float32; frozen ones come from the models the
run starts from. ``ppo_state.json`` has the KL controller, the totals, and the fields that decide the data order. The
Trainer adds optimizer, scheduler, random states and ``trainer_state.json``; where the best policy is kept, its weights
are there as well. A checkpoint is written under another name, marked with the digests of its files
(``align.training.checkpoints``), and renamed.
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
from align.store.atomic_write import sync_folder
from align.training import checkpoints

WEIGHTS = "model.safetensors"
STATE = "ppo_state.json"
BEST = "best.safetensors"
"""The weights of the best policy so far, where ``keep`` asks for them."""
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
    checkpoints.mark_complete(folder)
    target = output_dir / folder.name
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    sync_folder(output_dir)
    shutil.rmtree(draft, ignore_errors=True)
    rotate_checkpoints(str(output_dir), save_total_limit=limit)


def last_checkpoint(output_dir: Path, warn: checkpoints.Say = print) -> Path | None:
    """The newest whole ``checkpoint-<step>`` in ``output_dir``, or None; leftovers of a killed save are removed.

    A damaged checkpoint is moved to ``damaged/``; ``warn`` is told, and where the run resumes instead. One without a
    marker is left alone: it is not of this trainer, which marks a checkpoint before it gets its name.
    """
    if not output_dir.is_dir():
        return None
    shutil.rmtree(output_dir / DRAFT, ignore_errors=True)
    return checkpoints.last_complete(output_dir, warn, unmarked="leave")


def check_whole(folder: Path) -> None:
    """Raise ``UserError`` unless the files of a checkpoint that a script names are those that were written."""
    reason = checkpoints.find_damage(folder)
    if reason is not None:
        raise UserError(
            f"{folder} is damaged: {reason}. Resume from an older checkpoint (`last_checkpoint(output_dir)` finds the "
            "newest whole one), or start anew."
        )
