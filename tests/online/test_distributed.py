"""Two processes with half the batch each make the same update as one: counts, spreads and statistics are global."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from tests.online.conftest import METHODS

DIFFERENT = ("seconds", "per_second", "peak_memory", "runtime", "parity", "learning_rate", "epoch")


def launch(processes: int, tiny_model, out, method) -> dict:
    out.parent.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if processes > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "tests.online.one_of_two", str(tiny_model), str(out), method]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in running:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_the_update_of_one(tiny_model, tmp_path, method):
    one = launch(1, tiny_model, tmp_path / "one" / "out.pt", method)
    two = launch(2, tiny_model, tmp_path / "two" / "out.pt", method)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, tensor in one["weights"].items():
        assert (tensor - two["weights"][name]).abs().max() <= 1e-5, name
    for first, second in zip(one["logs"], two["logs"], strict=True):
        compared = [name for name in first if not any(word in name for word in DIFFERENT)]
        assert {"score", "kl", "ptx_loss", "loss"} <= set(compared)
        for name in compared:
            assert second[name] == pytest.approx(first[name], abs=5e-5), name
