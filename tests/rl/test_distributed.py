"""Two processes with half the batch each make the same update as one: counts, whitening and statistics are global."""

from __future__ import annotations

import pytest

from tests.support.rl.distributed_run import launch

MODULE = "tests.support.rl.distributed_run"
SAME = ("loss", "score", "score_std", "kl", "entropy", "reward", "advantage", "advantage_std", "explained_variance")
ALSO = ("value_loss", "policy_loss", "ratio", "clipfrac", "length", "eos_rate", "grad_norm_policy", "grad_norm_critic")
VALIDATED = ("eval_score", "eval_kl", "eval_length", "eval_eos_rate")


def test_two_processes_make_the_update_of_one(tiny_model, tmp_path):
    single_process = launch(MODULE, 1, tiny_model, tmp_path / "one" / "out.pt")
    two_processes = launch(MODULE, 2, tiny_model, tmp_path / "two" / "out.pt")
    assert (single_process["processes"], two_processes["processes"]) == (1, 2)
    assert single_process["weights"].keys() == two_processes["weights"].keys()
    for name, tensor in single_process["weights"].items():
        assert (tensor - two_processes["weights"][name]).abs().max() <= 1e-5, name
    assert two_processes["kl_coef"] == pytest.approx(single_process["kl_coef"], abs=1e-7)
    for first, second in zip(single_process["logs"], two_processes["logs"], strict=True):
        for name in (*SAME, *ALSO, "ptx_loss"):
            assert second[name] == pytest.approx(first[name], abs=2e-5), name
    assert [entry["update"] for entry in single_process["validations"]] == [0, 1, 2]
    for first, second in zip(single_process["validations"], two_processes["validations"], strict=True):
        for name in VALIDATED:
            assert second[name] == pytest.approx(first[name], abs=2e-5), name


@pytest.mark.slow
def test_two_processes_warm_the_critic_up_as_one_does(tiny_model, tmp_path):
    single_process, two_processes = (
        launch(MODULE, count, tiny_model, tmp_path / str(count) / "out.pt", "warming") for count in (1, 2)
    )
    assert (single_process["processes"], two_processes["processes"]) == (1, 2)
    assert single_process["weights"].keys() == two_processes["weights"].keys()
    for name, tensor in single_process["weights"].items():
        assert (tensor - two_processes["weights"][name]).abs().max() <= 1e-5, name
    assert [entry["grad_norm_policy"] > 0 for entry in single_process["logs"]] == [False, True]
    assert two_processes["logs"][0]["grad_norm_policy"] == 0.0
