"""Runs killed with SIGKILL at twenty random points end as the uninterrupted ones, bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.environments.buttons import make_presser

KILLS = 20


class Run:
    """A module of ``tests.support.rl`` that trains from the last checkpoint in a folder."""

    def __init__(self, module: str, *arguments: Path) -> None:
        self.command = [sys.executable, "-m", f"tests.support.rl.{module}", *map(str, arguments)]

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        (folder / "begun").unlink(missing_ok=True)
        command = [*self.command, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(folder / "stderr").open("wb"))

    def finish(self, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
        assert self.start(folder).wait(timeout=300) == 0, (folder / "stderr").read_text()[-2000:]
        return json.loads((folder / "done.json").read_text()), load_file(folder / "weights.safetensors")


def kill_at_random(run: Run, folder: Path, longest: float) -> None:
    """Kill a run twenty times, each life at most ``longest`` seconds after its training began."""
    rng = random.Random(11)
    for killed in range(KILLS):
        process = run.start(folder)
        while not (folder / "begun").exists():
            assert process.poll() is None, (folder / "stderr").read_text()[-2000:]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, longest))
        assert process.poll() is None, f"the run was over after {killed} kills; give it more updates"
        process.kill()
        process.wait()


def seconds(folder: Path) -> float:
    """Return how long the training of an uninterrupted run took."""
    return (folder / "done.json").stat().st_mtime - (folder / "begun").stat().st_mtime


def check_twenty_kills(run: Run, tmp_path: Path) -> Any:
    """Return the metrics of a run that was killed, after comparing it with the uninterrupted one."""
    expected, expected_weights = run.finish(tmp_path / "whole")
    # Twenty lives of at most this, half of it on average, make three fifths of a run.
    kill_at_random(run, tmp_path / "killed", 1.2 / KILLS * seconds(tmp_path / "whole"))
    actual, weights = run.finish(tmp_path / "killed")
    assert actual == expected
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(tensor, expected_weights[name]) for name, tensor in weights.items())
    return actual


@pytest.mark.slow
def test_twenty_kills_change_nothing(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> None:
    check_twenty_kills(Run("killed_run", tiny_model, tiny_reward), tmp_path)


@pytest.mark.slow
def test_twenty_kills_of_episodes_repeat_no_call(tiny_model: Path, tmp_path: Path) -> None:
    presser = make_presser(tiny_model, tmp_path / "presser")
    history = check_twenty_kills(Run("killed_episodes", presser), tmp_path)
    presses = sum(16 * (entry["calls"] - entry["tool_errors"] - entry["malformed_calls"]) for entry in history)
    # A call whose result a kill took before it was on disk is made again: at most one for each kill and worker.
    made = len((tmp_path / "killed" / "presses").read_text().splitlines())
    assert round(presses) <= made <= round(presses) + KILLS
    assert len((tmp_path / "whole" / "presses").read_text().splitlines()) == round(presses)
