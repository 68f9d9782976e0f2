"""Files that a checkpoint has in addition to the Trainer's, and the checkpoint that a killed run resumes from.

``model.safetensors`` has every trained tensor of policy and critic in float32; frozen ones come from the models that
the run starts from. ``ppo_state.json`` has the KL controller, the totals, and the arguments that decide the order of
the data. The Trainer adds optimizer, scheduler, random states and ``trainer_state.json``. ``best.safetensors`` has the
weights of the best policy if ``keep`` asks for it. A checkpoint is written under another name, marked with the digests
of its files (``align.training.checkpoints``), and renamed.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import rotate_checkpoints

from align.config.launch import rank, world_size
from align.errors import UserError
from align.store.json_files import sync_folder, write_text_atomically
from align.training import checkpoints

WEIGHTS = "model.safetensors"
STATE = "ppo_state.json"
BEST = "best.safetensors"
"""The weights of the best policy so far, if ``keep`` asks for them."""
DRAFT = ".draft"


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write every trained parameter; tied ones once."""
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / WEIGHTS, metadata={"format": "pt"})


def load_trained(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's tensors into the live model. Raises ``UserError`` unless names and shapes are the same."""
    stored = load_file(folder / WEIGHTS)
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differing = sorted(stored.keys() ^ live.keys())
    if not differing:
        differing = [name for name, tensor in stored.items() if tensor.shape != live[name].shape]
    if differing:
        raise UserError(
            f"{folder} was written by a run with another model, tuning or critic: {differing[0]} differs "
            f"({len(differing)} in all). Resume with the settings it was started with, or start over."
        )
    with torch.no_grad():
        # In place: the optimizer and tied modules keep their references to these parameters.
        for name, tensor in stored.items():
            live[name].copy_(tensor)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``ppo_state.json``; Python's floats survive JSON exactly."""
    write_text_atomically(folder / STATE, json.dumps(state, indent=1))


def load_state(folder: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return the stored state. Raises ``UserError`` if the run's data order would differ from the checkpoint's."""
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"{folder} has no {STATE}: it is not a checkpoint of PPO. Use another, or start over.")
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # Another value would give the next update other prompts or another order, and the run would be a different one.
    for name, value in state["fingerprint"].items():
        if fingerprint.get(name) != value:
            raise UserError(
                f"{folder} was written with {name} {value}, this run has {fingerprint.get(name)}; the resumed run "
                "would not continue it. Set it back, or start over."
            )
    return state


def save_random_state(folder: Path) -> None:
    """Write this process's random states of Python, numpy and torch, in the format of transformers' Trainer."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    torch.save(states, _random_state_file(folder))


def load_random_state(folder: Path) -> None:
    """Restore what ``save_random_state`` wrote; a checkpoint of another number of processes may lack the file."""
    file = _random_state_file(folder)
    if not file.is_file():
        return
    with safe_globals():
        states = torch.load(file, map_location="cpu", weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _random_state_file(folder: Path) -> Path:
    return folder / ("rng_state.pth" if world_size() == 1 else f"rng_state_{rank()}.pth")


def clear(draft: Path, accelerator: Any) -> None:
    """Make ``draft`` an empty folder, once for all processes."""
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    accelerator.wait_for_everyone()


def publish(draft: Path, output_dir: Path, limit: int | None) -> None:
    """Move the checkpoint in ``draft`` to its place, then delete the oldest beyond ``limit``."""
    (folder,) = draft.glob("checkpoint-*")
    # The marker lists digests, so it is written last; the rename then makes the checkpoint visible at once.
    checkpoints.mark_complete(folder)
    target = output_dir / folder.name
    # A run that resumed from an earlier step writes this checkpoint a second time.
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    sync_folder(output_dir)
    shutil.rmtree(draft, ignore_errors=True)
    rotate_checkpoints(str(output_dir), save_total_limit=limit)


def last_checkpoint(output_dir: Path, warn: checkpoints.Warn = print) -> Path | None:
    """Return the newest complete ``checkpoint-<step>`` in ``output_dir``, or None; remove leftovers of a killed save.

    A damaged checkpoint is moved to ``damaged/``, with a warning that names the checkpoint that the run resumes from
    instead. A checkpoint without a marker stays: another program wrote it, because this trainer marks a checkpoint
    before renaming it.
    """
    if not output_dir.is_dir():
        return None
    shutil.rmtree(output_dir / DRAFT, ignore_errors=True)
    return checkpoints.last_complete(output_dir, warn, unmarked="leave")


def check_files(folder: Path) -> None:
    """Raise ``UserError`` if the files of a checkpoint that a script names have changed since they were written."""
    reason = checkpoints.find_damage(folder)
    if reason is not None:
        raise UserError(
            f"{folder} is damaged: {reason}. Resume from an older checkpoint (`last_checkpoint(output_dir)` returns "
            "the newest complete one), or start over."
        )
