"""Two processes with half the batch each make the same update as one: counts, whitening and statistics are global."""

from __future__ import annotations

import pytest

from tests.support.rl.distributed_run import launch

MODULE = "tests.support.rl.distributed_run"
SAME = ("loss", "score", "score_std", "kl", "entropy", "reward", "advantage", "advantage_std", "explained_variance")
ALSO = ("value_loss", "policy_loss", "ratio", "clipfrac", "length", "eos_rate", "grad_norm_policy", "grad_norm_critic")
VALIDATED = ("eval_score", "eval_kl", "eval_length", "eval_eos_rate")


def test_two_processes_make_the_update_of_one(tiny_model, tmp_path):
    one = launch(MODULE, 1, tiny_model, tmp_path / "one" / "out.pt")
    two = launch(MODULE, 2, tiny_model, tmp_path / "two" / "out.pt")
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


@pytest.mark.slow
def test_two_processes_warm_the_critic_up_as_one_does(tiny_model, tmp_path):
    one, two = (launch(MODULE, count, tiny_model, tmp_path / str(count) / "out.pt", "warming") for count in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["weights"].keys() == two["weights"].keys()
    for name, tensor in one["weights"].items():
        assert (tensor - two["weights"][name]).abs().max() <= 1e-5, name
    assert [entry["grad_norm_policy"] > 0 for entry in one["logs"]] == [False, True]
    assert two["logs"][0]["grad_norm_policy"] == 0.0
