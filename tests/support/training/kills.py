"""Kills that aim: a stage dies at a chosen moment of a chosen checkpoint, or between its last step and its result.

The stage runs in this process, and what kills it is an exception that nothing catches. What is on the disk is then
what a SIGKILL at that moment leaves.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import align.rl.checkpoint
import align.rl.run
import align.training.save
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.rl.trainer import RLTrainer
from align.training import checkpoints

OF_A_CHECKPOINT = ("before", "during", "unmarked", "after")
"""Before its first file, in the middle of one, with all files but no mark, and with the mark."""
OF_THE_END = ("trained", "saved")
"""After the last step and its checkpoint, and with the model's files half written."""
TIMED = ("seconds", "per_second", "peak_memory", "resumed_from_step")
CACHED = ("reference_computed", "reference_cached", "teacher_rows_computed", "teacher_rows_cached")


class Killed(BaseException):
    """Stands for SIGKILL."""


@dataclass(frozen=True)
class Kill:
    """When a stage dies; ``step`` is the checkpoint's, and means nothing to the moments of the end."""

    moment: str
    step: int = 0

    def __str__(self) -> str:
        return f"{self.moment}-{self.step}" if self.step else self.moment


def kills(steps: Sequence[int]) -> list[Kill]:
    """Every moment of the checkpoints of ``steps``, and of the end, in the order in which they come."""
    return [Kill(moment, step) for step in steps for moment in OF_A_CHECKPOINT] + [Kill(name) for name in OF_THE_END]


@contextmanager
def armed(kill: Kill) -> Iterator[None]:
    """Inside, a stage dies at ``kill``. Supervised trainers have the loop of transformers, the others have ours."""
    trainer = transformers.Trainer
    with pytest.MonkeyPatch.context() as patch:
        if kill.moment == "before":
            patch.setattr(trainer, "_save_checkpoint", _dying_before(trainer._save_checkpoint, kill.step))
            save = align.rl.checkpoint.save_checkpoint
            patch.setattr(align.rl.checkpoint, "save_checkpoint", _dying_before(save, kill.step))
        elif kill.moment == "during":
            patch.setattr(torch, "save", _dying_in_the_middle(torch.save, kill.step))
        elif kill.moment == "unmarked":
            patch.setattr(checkpoints, "mark_complete", _dying_unmarked(checkpoints.mark_complete, kill.step))
        elif kill.moment == "after":
            for owner, name in ((trainer, "_maybe_log_save_evaluate"), (RLTrainer, "save")):
                patch.setattr(owner, name, _dying_after(getattr(owner, name), kill.step))
        elif kill.moment == "trained":
            patch.setattr(trainer, "_finalize_training", _dying_trained)
            patch.setattr(align.rl.run, "end", _dying_trained)
        elif kill.moment == "saved":
            for module in (align.training.save, align.rl.checkpoint):
                patch.setattr(module, "save_tuned", _dying_half_saved)
        yield


def _dying_before(save: Callable[..., None], step: int) -> Callable[..., None]:
    def replaced(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == step:
            raise Killed
        save(self, *args, **kwargs)

    return replaced


def _dying_in_the_middle(save: Callable[..., None], step: int) -> Callable[..., None]:
    def replaced(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(value, path, *args, **kwargs)
        file = Path(path)
        if file.parent.name == f"checkpoint-{step}" and file.name == "optimizer.pt":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            raise Killed

    return replaced


def _dying_unmarked(mark: Callable[[Path], None], step: int) -> Callable[[Path], None]:
    def replaced(folder: Path) -> None:
        if folder.name == f"checkpoint-{step}":
            raise Killed
        mark(folder)

    return replaced


def _dying_after(save: Callable[..., None], step: int) -> Callable[..., None]:
    def replaced(self: Any, *args: Any, **kwargs: Any) -> None:
        saves = self.control.should_save and self.state.global_step == step
        save(self, *args, **kwargs)
        if saves:
            raise Killed

    return replaced


def _dying_trained(*args: Any, **kwargs: Any) -> None:
    raise Killed


def _dying_half_saved(model: Any, tokenizer: Any, out_dir: Path) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "model.safetensors").write_bytes(b"half")
    raise Killed


def run(stage: StageContext) -> dict[str, Any]:
    """Run the stage; its metrics."""
    return STAGES[stage.name].runner()(stage)


def run_killed(stage: StageContext, sequence: Sequence[Kill]) -> dict[str, Any]:
    """Run the stage, which dies at each of ``sequence`` in turn and is run again; the last run's metrics."""
    for kill in sequence:
        with armed(kill), pytest.raises(Killed):
            run(stage)
            pytest.fail(f"the stage came to its end and was not killed at {kill}")
    metrics = run(stage)
    assert not (stage.checkpoints / checkpoints.DAMAGED).exists(), "a kill damaged a checkpoint that was whole"
    return metrics


def points(stage: StageContext) -> dict[int, dict[str, float]]:
    """The curves' values by step, those of a repeated step from the last attempt at it."""
    values: dict[int, dict[str, float]] = {}
    for line in stage.events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "metrics":
            steady = {name: value for name, value in event.items() if name not in ("event", "time", "step")}
            values.setdefault(event["step"], {}).update(untimed(steady))
    return values


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without those that say how long something took, or what a cache had."""
    return {
        name: value for name, value in metrics.items() if name not in CACHED and not any(word in name for word in TIMED)
    }


def assert_same(
    uninterrupted: StageContext, killed: StageContext, expected: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """Weights, metrics and curves are equal to the last bit."""
    assert _differing(untimed(metrics), untimed(expected)) == {}
    assert _differing(points(killed), points(uninterrupted)) == {}
    weights, others = (load_file(stage.output / "model" / "model.safetensors") for stage in (uninterrupted, killed))
    assert _differing(others, weights, same=torch.equal) == {}


def _differing(values: dict[Any, Any], expected: dict[Any, Any], same: Callable[..., bool] = operator.eq) -> Any:
    names = values.keys() | expected.keys()
    return {
        name: (values.get(name), expected.get(name))
        for name in names
        if name not in values or name not in expected or not same(values[name], expected[name])
    }
