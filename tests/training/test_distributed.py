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


def test_two_processes_train_as_one(train_once: Callable[..., Made]) -> None:
    same(train_once("sft", 1), train_once("sft", 2))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_losses_are_those_of_one_process(
    train_once: Callable[..., Made], name: str, processes: int, strategy: str
) -> None:
    same(train_once(name, 1), train_once(name, processes, strategy))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ppo_lora", "sft_lora", "grpo", "rloo", "online_dpo", "rejection", "simpo", "dpo_anchored"]
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_so_are_those_of_other_trainers_and_of_adapters(
    train_once: Callable[..., Made], name: str, strategy: str
) -> None:
    same(train_once(name, 1), train_once(name, 2, strategy))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "orpo", "cpo", "kto", "distill"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_rest_train_too(train_once: Callable[..., Made], name: str, strategy: str) -> None:
    actual = train_once(name, 2, strategy)
    assert len(actual.losses) >= 3 and all(torch.isfinite(torch.tensor(actual.losses)))
    assert actual.metrics["loss_last"] < actual.metrics["loss_first"]


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
    uninterrupted = run_pipeline(pipeline(name, {"processes": 1}, **more), store=tmp_path / "whole")
    expected = Made(name, uninterrupted.artifacts[name].path, uninterrupted.metrics(name))
    actual = interrupted(tmp_path, name, first, then)
    assert actual.metrics["tokens"] == expected.metrics["tokens"]
    assert actual.losses[-1] == pytest.approx(expected.losses[-1], abs=2 * WITHIN)
    for key, tensor in expected.weights.items():
        assert (tensor - actual.weights[key]).abs().max() < 1e-3, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ppo"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_bfloat16_and_checkpointed_activations_go_with_it(tmp_path: Path, name: str, strategy: str) -> None:
    actual = {}
    for processes in (1, 2):
        launch = {"processes": processes, "strategy": strategy}
        finished = run_pipeline(
            pipeline(name, launch, precision="bfloat16", gradient_checkpointing=True), store=tmp_path / f"{processes}"
        )
        actual[processes] = Made(name, finished.artifacts[name].path, finished.metrics(name))
    # Batches of other sizes round otherwise, and PPO samples other tokens by that: from its second update on, the two
    # runs learn from other responses.
    comparable = 1 if name == "ppo" else len(actual[1].losses)
    assert len(actual[2].losses) == len(actual[1].losses)
    assert actual[2].losses[:comparable] == pytest.approx(actual[1].losses[:comparable], abs=0.01)
