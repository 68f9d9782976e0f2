"""Two processes with half the batch each make the same update as one: counts, spreads and statistics are global."""

from __future__ import annotations

import pytest

from tests.support.rl.distributed_run import launch
from tests.support.rl.trainers import METHODS

MODULE = "tests.support.rl.objectives.distributed_run"
DIFFERENT = ("seconds", "per_second", "peak_memory", "runtime", "parity", "learning_rate", "epoch")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_the_update_of_one(tiny_model, tmp_path, method):
    single_process = launch(MODULE, 1, tiny_model, tmp_path / "one" / "out.pt", method)
    two_processes = launch(MODULE, 2, tiny_model, tmp_path / "two" / "out.pt", method)
    assert (single_process["processes"], two_processes["processes"]) == (1, 2)
    for name, tensor in single_process["weights"].items():
        assert (tensor - two_processes["weights"][name]).abs().max() <= 1e-5, name
    for first, second in zip(single_process["logs"], two_processes["logs"], strict=True):
        compared = [name for name in first if not any(word in name for word in DIFFERENT)]
        assert {"score", "kl", "ptx_loss", "loss"} <= set(compared)
        for name in compared:
            assert second[name] == pytest.approx(first[name], abs=5e-5), name
