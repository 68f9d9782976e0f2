"""A run killed with SIGKILL at twenty random points ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

KILLS = 20


def start(tiny_model: Path, tiny_reward: Path, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    (folder / "begun").unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.support.rl.killed_run", str(tiny_model), str(tiny_reward), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(folder / "stderr").open("wb"))


def finish(process: subprocess.Popen[bytes], folder: Path) -> tuple[dict, dict]:
    assert process.wait(timeout=300) == 0, (folder / "stderr").read_text()[-2000:]
    return json.loads((folder / "done.json").read_text()), load_file(folder / "weights.safetensors")


@pytest.mark.slow
def test_twenty_kills_change_nothing(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> None:
    uninterrupted = tmp_path / "whole"
    expected, expected_weights = finish(start(tiny_model, tiny_reward, uninterrupted), uninterrupted)
    # Twenty lives of at most this, half of it on average, make three fifths of a run.
    longest = 1.2 / KILLS * ((uninterrupted / "done.json").stat().st_mtime - (uninterrupted / "begun").stat().st_mtime)
    folder, rng, killed = tmp_path / "killed", random.Random(11), 0
    while killed < KILLS:
        process = start(tiny_model, tiny_reward, folder)
        while not (folder / "begun").exists():
            assert process.poll() is None, (folder / "stderr").read_text()[-2000:]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, longest))
        assert process.poll() is None, f"the run was over after {killed} kills; give it more updates"
        process.kill()
        process.wait()
        killed += 1
    actual, weights = finish(start(tiny_model, tiny_reward, folder), folder)
    assert actual == expected
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(tensor, expected_weights[name]) for name, tensor in weights.items())
