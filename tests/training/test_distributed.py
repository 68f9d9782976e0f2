"""The same losses in two and three processes as in one, by DDP and in parts; runs that go on in another number of them.

Whole pipelines on a tiny model with gloo, every stage's processes started as ``align run`` starts them. 41 rows in
batches of 12: an epoch's last step has 5, which no number of processes shares out evenly. Runs are made once a module.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from align.runner.runner import run_pipeline
from tests.support.training.distributed_runs import STAGES, WITHIN, Made, interrupted, pipeline, same

pytestmark = pytest.mark.timeout(1800)


def test_two_processes_train_as_one(made: Callable[..., Made]) -> None:
    same(made("sft", 1), made("sft", 2))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_losses_are_those_of_one_process(
    made: Callable[..., Made], name: str, processes: int, strategy: str
) -> None:
    same(made(name, 1), made(name, processes, strategy))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_lora", "sft_lora", "grpo", "rloo", "online_dpo", "rejection", "simpo"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_so_are_those_of_other_trainers_and_of_adapters(made: Callable[..., Made], name: str, strategy: str) -> None:
    same(made(name, 1), made(name, 2, strategy))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "orpo", "cpo", "kto", "distill"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_rest_train_too(made: Callable[..., Made], name: str, strategy: str) -> None:
    found = made(name, 2, strategy)
    assert len(found.losses) >= 3 and all(torch.isfinite(torch.tensor(found.losses)))
    assert found.metrics["loss_last"] < found.metrics["loss_first"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "sft_lora", "ppo"])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"processes": 2}, {"processes": 1}),
        ({"processes": 2, "strategy": "fsdp2"}, {"processes": 3}),
        ({"processes": 2}, {"processes": 2, "strategy": "fsdp2"}),
    ],
    ids=["2-to-1", "fsdp2-to-3", "ddp-to-fsdp2"],
)
def test_a_run_that_lost_a_rank_goes_on_in_another_number(
    tmp_path: Path, name: str, first: dict[str, Any], then: dict[str, Any]
) -> None:
    more = {"max_steps": 40} if "max_steps" in STAGES[name] else {"updates": 12}
    whole = run_pipeline(pipeline(name, {"processes": 1}, **more), store=tmp_path / "whole")
    expected = Made(name, whole.artifacts[name].path, whole.metrics(name))
    found = interrupted(tmp_path, name, first, then)
    assert found.metrics["tokens"] == expected.metrics["tokens"]
    assert found.losses[-1] == pytest.approx(expected.losses[-1], abs=2 * WITHIN)
    for key, tensor in expected.weights.items():
        assert (tensor - found.weights[key]).abs().max() < 1e-3, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ppo"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_bfloat16_and_checkpointed_activations_go_with_it(tmp_path: Path, name: str, strategy: str) -> None:
    found = {}
    more = {"trainer": {"gradient_checkpointing": True}} if name == "ppo" else {"gradient_checkpointing": True}
    for processes in (1, 2):
        launch = {"processes": processes, "strategy": strategy}
        finished = run_pipeline(pipeline(name, launch, precision="bfloat16", **more), store=tmp_path / f"{processes}")
        found[processes] = Made(name, finished.artifacts[name].path, finished.metrics(name))
    assert found[2].losses == pytest.approx(found[1].losses, abs=0.03)
