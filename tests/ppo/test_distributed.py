"""Two processes with half the batch each make the same update as one: counts, whitening and statistics are global."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

SAME = ("loss", "score", "score_std", "kl", "entropy", "reward", "advantage", "advantage_std", "explained_variance")
ALSO = ("value_loss", "policy_loss", "ratio", "clipfrac", "length", "eos_rate", "grad_norm_policy", "grad_norm_critic")
VALIDATED = ("eval_score", "eval_kl", "eval_length", "eval_eos_rate")


def launch(processes: int, tiny_model, out) -> dict:
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
        command = [sys.executable, "-m", "tests.ppo.one_of_two", str(tiny_model), str(out)]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in running:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-3000:]
    return torch.load(out, weights_only=True)


def test_two_processes_make_the_update_of_one(tiny_model, tmp_path):
    one = launch(1, tiny_model, tmp_path / "one" / "out.pt")
    two = launch(2, tiny_model, tmp_path / "two" / "out.pt")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["weights"].keys() == two["weights"].keys()
    for name, tensor in one["weights"].items():
        assert (tensor - two["weights"][name]).abs().max() <= 1e-5, name
    assert two["kl_coef"] == pytest.approx(one["kl_coef"], abs=1e-7)
    for first, second in zip(one["logs"], two["logs"], strict=True):
        for name in (*SAME, *ALSO, "ptx_loss"):
            assert second[name] == pytest.approx(first[name], abs=2e-5), name
    assert [entry["update"] for entry in one["validations"]] == [0, 1, 2]
    for first, second in zip(one["validations"], two["validations"], strict=True):
        for name in VALIDATED:
            assert second[name] == pytest.approx(first[name], abs=2e-5), name
