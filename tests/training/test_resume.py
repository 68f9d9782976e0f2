"""A killed stage goes on: the remaining losses and the final weights are those of the uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.pipeline.stop_signal import Stopped, clear_request, request_stop
from align.training.checkpoints import MARKER, is_complete, mark_complete
from align.training.fit import SECONDS_FILE
from tests.support.fork_server import start_module
from tests.support.training.harness import losses
from tests.support.training.killed_stage import Killed, dying
from tests.support.training.training_stages import FULL, make_stage

LORA = {"method": "lora", "rank": 4}


MID_EPOCH, EPOCH_END = (4, 10), (5, 12)


MOMENTS = {
    "mid-epoch-lora": (*MID_EPOCH, LORA),
    "epoch-end-full": (*EPOCH_END, FULL),
    "mid-epoch-full": (*MID_EPOCH, FULL),
    "epoch-end-lora": (*EPOCH_END, LORA),
}
QUICK = ("sft-mid-epoch-lora", "reward-mid-epoch-lora", "dpo-mid-epoch-lora", "sft-epoch-end-full")
"""The others are slow tests."""


def resumptions() -> list[Any]:
    names = [(kind, moment) for kind in ("sft", "reward", "dpo") for moment in MOMENTS]
    marks = {name: () if "-".join(name) in QUICK else pytest.mark.slow for name in names}
    return [pytest.param(name[0], *MOMENTS[name[1]], id="-".join(name), marks=marks[name]) for name in names]


@pytest.mark.parametrize(("kind", "save_steps", "dies_at", "tuning"), resumptions())
def test_resumed_run_equals_the_uninterrupted_one(
    kind: str, save_steps: int, dies_at: int, tuning: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    run = STAGES[kind].runner()
    uninterrupted = make_stage(kind, tmp_path / "whole", tiny_model, tuning, save_steps=save_steps)
    run(uninterrupted)
    parts = make_stage(kind, tmp_path / "parts", tiny_model, tuning, save_steps=save_steps)
    with pytest.raises(Killed):
        run(dying(parts, dies_at))
    metrics = run(parts)
    assert metrics["resumed_from_step"] == dies_at - 2
    assert metrics["steps"] == 15
    assert losses(parts) == losses(uninterrupted)
    expected, actual = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert expected.keys() == actual.keys()
    assert all(expected[name].equal(actual[name]) for name in expected)


class Asking(StageContext):
    """A context that asks the stage to stop when step ``at`` is reported."""

    at = 0

    def progress(self, done: float, total: float, unit: str = "steps", **shown: Any) -> None:
        super().progress(done, total, unit, **shown)
        if unit == "steps" and done == self.at:
            request_stop(self.events.parent)


def asking(plain: StageContext, step: int) -> StageContext:
    new_asking = Asking(**{field.name: getattr(plain, field.name) for field in fields(plain)})
    object.__setattr__(new_asking, "at", step)
    return new_asking


def test_stopped_stage_saves_at_once_and_resumes_exactly(tiny_model: Path, tmp_path: Path) -> None:
    run = STAGES["sft"].runner()
    uninterrupted, parts = (
        make_stage("sft", tmp_path / name, tiny_model, LORA, save_steps=100) for name in ("whole", "parts")
    )
    run(uninterrupted)
    with pytest.raises(Stopped, match="stopped as asked, at step [78] of 15"):  # the one under way is finished
        run(asking(parts, 7))
    (remaining,) = parts.checkpoints.glob("checkpoint-*")
    assert is_complete(remaining) and remaining.name in ("checkpoint-7", "checkpoint-8")
    clear_request(parts.events.parent)
    assert run(parts)["resumed_from_step"] == int(remaining.name[-1])
    assert losses(parts) == losses(uninterrupted)
    expected, actual = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert all(expected[name].equal(actual[name]) for name in expected)


def test_a_stage_that_is_asked_at_its_last_step_is_finished(tiny_model: Path, tmp_path: Path) -> None:
    context = make_stage("sft", tmp_path / "run", tiny_model, LORA, save_steps=100)
    assert STAGES["sft"].runner()(asking(context, 15))["steps"] == 15
    assert (context.output / "model" / "model.safetensors").is_file()


def test_stage_killed_after_its_last_step_only_finishes(tiny_model: Path, tmp_path: Path) -> None:
    run = STAGES["sft"].runner()
    uninterrupted = make_stage("sft", tmp_path / "run", tiny_model, FULL, save_steps=4)
    first = run(uninterrupted)
    again = run(uninterrupted)
    assert again["resumed_from_step"] == 15
    assert again["test_loss_after"] == first["test_loss_after"]
    assert again["tokens"] == first["tokens"]
    last = uninterrupted.checkpoints / "checkpoint-15"
    assert SECONDS_FILE in json.loads((last / MARKER).read_text())["sha256"]
    assert first["training_seconds"] >= float((last / SECONDS_FILE).read_text()) > 0
    assert again["training_seconds"] >= float(
        (last / SECONDS_FILE).read_text()
    )  # of training that this attempt found done
    for each in (first, again):
        assert each["tokens_per_second"] == pytest.approx(each["tokens"] / each["training_seconds"])


def test_checkpoint_without_seconds_is_excluded_from_the_speed(tiny_model: Path, tmp_path: Path) -> None:
    uninterrupted = make_stage("sft", tmp_path / "run", tiny_model, FULL, save_steps=10)
    first = STAGES["sft"].runner()(uninterrupted)
    shutil.rmtree(uninterrupted.checkpoints / "checkpoint-15")
    (uninterrupted.checkpoints / "checkpoint-10" / SECONDS_FILE).unlink()
    mark_complete(uninterrupted.checkpoints / "checkpoint-10")
    again = STAGES["sft"].runner()(uninterrupted)
    rest = again["tokens_per_second"] * again["training_seconds"]
    state = json.loads((uninterrupted.checkpoints / "checkpoint-10" / "trainer_state.json").read_text())
    assert rest == pytest.approx(first["tokens"] - state["num_input_tokens_seen"])


def test_sigkill_in_the_middle_of_saving(tiny_model: Path, tmp_path: Path) -> None:
    uninterrupted = make_stage("sft", tmp_path / "whole", tiny_model, FULL, save_steps=1)
    STAGES["sft"].runner()(uninterrupted)
    root = tmp_path / "parts"
    log = tmp_path / "log.txt"
    child = start_module("tests.support.training.sft_run", [str(root), str(tiny_model)], log)
    try:
        deadline = time.monotonic() + 120
        while not (root / "checkpoints" / "checkpoint-5").exists():
            assert child.poll() is None, f"the stage ended before it could be killed: {log.read_text()}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    parts = make_stage("sft", root, tiny_model, FULL, save_steps=1)
    metrics = STAGES["sft"].runner()(parts)
    assert 4 <= metrics["resumed_from_step"] < 15
    assert losses(parts) == losses(uninterrupted)
    expected, actual = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert all(expected[name].equal(actual[name]) for name in expected)
