"""Checkpoints of ``RLTrainer``, and the checkpoint that a killed run resumes from.

``model.safetensors`` has every trained tensor of policy and critic in float32; frozen tensors come from the models that
the run starts from. ``ppo_state.json`` has the KL controller, the totals, and the arguments that decide the order of
the data. The Trainer adds optimizer, scheduler, random states and ``trainer_state.json``. ``best.safetensors`` has the
weights of the best policy if ``keep`` asks for it. A checkpoint is written under another name, marked with the digests
of its files (``align.training.checkpoints``), and renamed: at any moment it is complete or not there.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from align.config.runtime.launch import rank, world_size
from align.config.stages.continue_from import FIXED
from align.errors import UserError
from align.models.checkpoints.sharding import full_model
from align.models.compute.processes import broadcast
from align.models.tuning.apply import save_tuned
from align.rl.alarms import Alarm
from align.rl.sampler import drop_journals
from align.store.json_files import sync_folder, write_text_atomically
from align.training import checkpoints, sharded
from align.training.checkpoints import link

WEIGHTS = "model.safetensors"
STATE = "ppo_state.json"
BEST = "best.safetensors"
"""The weights of the best policy so far, if ``keep`` asks for them."""
DRAFT = ".draft"


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write every trained parameter; tied parameters once."""
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


def load_state(folder: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return the stored state. Raises ``UserError`` if the run's data order would differ from the checkpoint's."""
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"{folder} has no {STATE}: it is not a checkpoint of PPO. Use another, or start over.")
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # Another value would give the next update other prompts or another order, and the run would be a different run.
    for name, value in state["fingerprint"].items():
        if fingerprint.get(name) != value:
            raise UserError(
                f"{folder} was written with {name} {value}, this run has {fingerprint.get(name)}; the resumed run "
                f"would not continue it. Set it back, or start over.{_as_a_stage(name, fingerprint.get(name))}"
            )
    return state


def _as_a_stage(name: str, value: Any) -> str:
    if name in FIXED:
        return ""
    return (
        " In a pipeline, another stage continues it with other settings: "
        f"`continue_from: {{stage: STAGE, change: {{{name}: {value}}}}}`."
    )


def change_settings(folder: Path, trainer: Any, changed: frozenset[str]) -> None:
    """Put the settings in ``changed`` of ``trainer`` into the checkpoint of a stage that it continues.

    All other settings, and the rest of the state, stay. The other stage may have ended early.
    """
    path = folder / STATE
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    own = trainer.args.fingerprint()
    kept = {name: value for name, value in state["fingerprint"].items() if name not in changed}
    state["fingerprint"] = kept | {name: value for name, value in own.items() if name in changed}
    if "kl_coef" in changed:
        # An adaptive controller begins anew with the coefficient that the user has set.
        state["kl"] = trainer.kl_controller.state_dict()
    state["stopped"] = None
    state.pop("ahead", None)  # responses that were sampled in advance, with the settings from before
    write_text_atomically(path, json.dumps(state, indent=1))


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


def _publish(folder: Path, output_dir: Path, limit: int | None) -> None:
    """Move the drafted checkpoint ``folder`` to its place, then delete the oldest beyond ``limit``."""
    # The marker lists digests, so it is written last; the rename then makes the checkpoint visible at once.
    checkpoints.mark_complete(folder)
    target = output_dir / folder.name
    # A run that resumed from an earlier step writes this checkpoint a second time.
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    sync_folder(output_dir)
    shutil.rmtree(output_dir / DRAFT, ignore_errors=True)
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


def save_policy(trainer: Any, output_dir: str | None) -> None:
    """Save the policy, LoRA merged, as an ordinary model folder; by default to the run's ``output_dir``."""
    with full_model(trainer.model) as model:  # all processes gather a sharded model, one writes it
        if trainer.args.should_save:
            save_tuned(model.policy, trainer.processing_class, Path(output_dir or str(trainer.args.output_dir)))


def save_checkpoint(trainer: Any) -> None:
    """Write a checkpoint under another name and rename it: at any moment it is complete or not there."""
    args = trainer.args
    output_dir = Path(str(args.output_dir))
    draft = output_dir / DRAFT
    if trainer.accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    folder = draft / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    with full_model(trainer.model) as model:  # all processes gather a sharded model, one writes it
        if args.should_save:
            folder.mkdir()
            save_trained(model, folder)
            # Python's floats survive JSON exactly.
            write_text_atomically(folder / STATE, json.dumps(_state_to_save(trainer), indent=1))
            if trainer.best is not None and trainer.best.weights is not None:
                # A link: the checkpoint keeps these weights when tidy deletes the folder of a former best policy.
                link(trainer.best.weights, folder / BEST)
    # Each process writes its own random state into the folder that the first process made.
    trainer.accelerator.wait_for_everyone()
    sharded.save_optimizer(trainer, folder)
    save_random_state(folder)
    if args.should_save:
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
    # The checkpoint is complete once all processes have written.
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        _publish(folder, output_dir, args.save_total_limit)
        # The journals of episodes that were learned from, and former best policies, are not needed any more.
        drop_journals(output_dir, trainer.update)
        if trainer.best is not None:
            trainer.best.tidy()


def load_checkpoint(trainer: Any, folder: Path) -> None:
    """Continue from a checkpoint. Raises ``UserError`` if it is damaged, or of a run with another order of the data."""
    # One process hashes the files. All processes read the weights.
    reason = checkpoints.find_damage(folder) if trainer.args.should_save else None
    if reason is not None:
        raise UserError(
            f"{folder} is damaged: {reason}. Resume from an older checkpoint (`last_checkpoint(output_dir)` returns "
            "the newest complete one), or start over."
        )
    state = load_state(folder, trainer.args.fingerprint())
    with full_model(trainer.model, store=True) as model:
        load_trained(model, folder)
    sharded.load_optimizer(trainer, folder)
    _load_state(trainer, state)
    if trainer.args.should_save and trainer.best is not None and trainer.best.weights is not None:
        # tidy may have deleted the folder, if a later checkpoint that is now lost had a better policy.
        trainer.best.weights.parent.mkdir(exist_ok=True)
        link(folder / BEST, trainer.best.weights)


def return_to_last(trainer: Any) -> None:
    """Load the policy of the last checkpoint, and write no other: an alarm ends the run after this update.

    Before the first checkpoint there is no other policy to load, and ``trainer.returned_to`` stays None.
    """
    trainer.control.should_save = False
    folder: Path | None = broadcast(lambda: last_checkpoint(Path(str(trainer.args.output_dir)), trainer.notify))
    step = 0 if folder is None else int(folder.name.rpartition("-")[2])
    # A folder may have checkpoints of an older run, which made more steps.
    if folder is None or step > trainer.state.global_step:
        return
    with full_model(trainer.model, store=True) as model:
        load_trained(model, folder)
    trainer.returned_to = step // trainer.config.steps_per_update


def _state_to_save(trainer: Any) -> dict[str, Any]:
    """Return KL controller, totals, alarms, score scale, best validation, prefetched rollouts, and fingerprint."""
    state: dict[str, Any] = {
        "kl": trainer.kl_controller.state_dict(),
        "totals": trainer.totals,
        "alarms": [asdict(alarm) for alarm in trainer.alarms],
        "stopped": trainer.stopped,
        "markers": trainer.update_log.markers.noticed,
        "fingerprint": trainer.args.fingerprint(),
    }
    if trainer.objective.scale is not None:
        state["scale"] = trainer.objective.scale.state_dict()
    if trainer.args.drift.max_staleness:
        # Older weights sampled these rollouts. A resumed run has no copy of them to sample from again.
        state["ahead"] = trainer.prefetcher.state_dict()
    if trainer.best is not None:
        state["best"] = trainer.best.best
    if trainer.tasks is not None:
        state["tasks"] = trainer.tasks.state_dict()
    return state


def _load_state(trainer: Any, state: dict[str, Any]) -> None:
    trainer.kl_controller.load_state_dict(state["kl"])
    # The run before may have neither scaled scores nor validated.
    if trainer.objective.scale is not None and "scale" in state:
        trainer.objective.scale.load_state_dict(state["scale"])
    name = trainer.config.best_metric
    best = state.get("best")
    # The run before may have chosen by other numbers.
    if trainer.best is not None and (name is None or name in (best or {})):
        trainer.best.best = best
    if trainer.tasks is not None and "tasks" in state:
        trainer.tasks.load_state_dict(state["tasks"])
    trainer.totals = state["totals"]
    trainer.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
    trainer.stopped = state["stopped"]
    trainer.update_log.markers.noticed = state.get("markers", {})
    trainer.prefetcher.load_state_dict(state.get("ahead", []), trainer.sampler.restore)
