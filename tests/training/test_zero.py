"""DeepSpeed's ZeRO on CPUs: the losses of one process, runs that go on elsewhere, and what is private in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config.runtime.launch import DeepspeedConfig
from align.errors import UserError
from align.runner.runner import run_pipeline
from tests.support.training.distributed_runs import Made, interrupted, pipeline, same

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    def run(name: str, stage: int, **changes: Any) -> Made:
        launch = {"processes": 2, "strategy": "deepspeed", "deepspeed": {"stage": stage}}
        finished = run_pipeline(pipeline(name, launch, **changes), store=tmp_path_factory.mktemp(f"{name}-{stage}"))
        return Made(name, finished.artifacts[name].path, finished.metrics(name))

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage"), [("sft", 1), ("sft", 2), ("sft", 3), ("reward", 2), ("dpo", 2), ("ppo", 2), ("ppo", 3)]
)
def test_the_losses_are_those_of_one_process(
    train_once: Callable[..., Made], zero: Callable[..., Made], name: str, stage: int
) -> None:
    same(train_once(name, 1), zero(name, stage))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_lora", "grpo", "simpo", "distill"])
def test_others_train_too(zero: Callable[..., Made], name: str) -> None:
    actual = zero(name, 2)
    assert len(actual.losses) >= 3 and all(torch.isfinite(torch.tensor(actual.losses)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_lost_a_rank_goes_on_without_deepspeed(tmp_path: Path, stage: int) -> None:
    uninterrupted = run_pipeline(pipeline("sft", {"processes": 1}, max_steps=40), store=tmp_path / "whole")
    expected = Made("sft", uninterrupted.artifacts["sft"].path, uninterrupted.metrics("sft"))
    first = {"processes": 2, "strategy": "deepspeed", "deepspeed": {"stage": stage}}
    actual = interrupted(tmp_path, "sft", first, {"processes": 1})
    assert actual.losses[-1] == pytest.approx(expected.losses[-1], abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_lost_a_rank_goes_on_with_it(tmp_path: Path, stage: int) -> None:
    uninterrupted = run_pipeline(pipeline("sft", {"processes": 1}, max_steps=40), store=tmp_path / "whole")
    expected = Made("sft", uninterrupted.artifacts["sft"].path, uninterrupted.metrics("sft"))
    then = {"processes": 2, "strategy": "deepspeed", "deepspeed": {"stage": stage}}
    actual = interrupted(tmp_path, "sft", {"processes": 2}, then)
    assert actual.losses[-1] == pytest.approx(expected.losses[-1], abs=2e-4)


def test_what_is_private_is_still_there() -> None:
    from accelerate.state import PartialState
    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import safe_get_full_grad, safe_set_full_fp32_param, safe_set_full_optimizer_state
    from transformers import Trainer

    assert callable(PartialState._prepare_backend)
    assert all(map(callable, (safe_get_full_grad, safe_set_full_fp32_param, safe_set_full_optimizer_state)))
    assert "self.engine.step()" in _source(DeepSpeedEngineWrapper.backward)
    for kind, flat in ((DeepSpeedZeroOptimizer, "single_partition_of_fp32_groups"),
                       (DeepSpeedZeroOptimizer_Stage3, "fp32_partitioned_groups_flat")):  # fmt: skip
        text = _source(kind)
        assert f"self.{flat}" in text and "self.clip_grad" in text
    assert "_hp_optimizer_states_linked" in _source(DeepSpeedZeroOptimizer)
    for name in ("_prepare_for_training", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler"):
        assert name in Trainer.__dict__


def _source(condition: Any) -> str:
    import inspect

    return inspect.getsource(condition)


@pytest.mark.parametrize(
    ("launch", "sft", "words"),
    [
        ({"deepspeed": {"stage": 2, "offload_parameters": True}}, {}, "offload_parameters needs stage 3; it is 2"),
        ({"strategy": "ddp", "deepspeed": {"stage": 1}}, {}, "used with `strategy: deepspeed` only; it is ddp"),
        ({}, {"ema": 0.9}, "ema does not go with strategy deepspeed; take fsdp2, or leave it out."),
        ({}, {"anchor": {"to": "l2", "weight": 0.1}}, "anchor does not go with strategy deepspeed"),
        ({}, {"keep": "best", "eval_steps": 2}, "keep: best does not go with strategy deepspeed"),
        ({}, {"tuning": {"method": "qlora", "rank": 4}}, "which strategy deepspeed cannot shard; take ddp."),
    ],
)
def test_what_does_not_go_with_it_is_refused(launch: dict[str, Any], sft: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        pipeline("sft", {"processes": 2, "strategy": "deepspeed", **launch}, **sft)
    assert words in str(caught.value) and str(caught.value).startswith("p.yaml: runtime.launch")


def test_critic_warm_up_is_refused_with_deepspeed() -> None:
    pipeline("ppo", {"processes": 2, "strategy": "fsdp2"}, critic_warmup_updates=2)
    with pytest.raises(UserError, match="critic_warmup_updates 2 does not go with strategy deepspeed.*take fsdp2"):
        pipeline("ppo", {"processes": 2, "strategy": "deepspeed"}, critic_warmup_updates=2)


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(UserError, match="install the extra `deepspeed`, or take fsdp2"):
        pipeline("sft", {"processes": 2, "strategy": "deepspeed"})


def test_what_is_asked_for_reaches_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from align.training import zero

    monkeypatch.setattr(zero, "_allow_cpus", lambda: None)
    options = zero.zero_options(
        DeepspeedConfig(stage=3, offload_optimizer=True, offload_parameters=True), on_gpu=False, bfloat16=True
    )
    config = options["deepspeed"]
    assert config["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": False},
    }
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and options["bf16"] is False
    from accelerate import DeepSpeedPlugin

    assert DeepSpeedPlugin(hf_ds_config=config).zero_stage == 3


def test_step_is_counted_in_micro_batches() -> None:
    from align.training.zero import count_micro_batches

    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}
    holder = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(config=config), per_device_train_batch_size=8)
    count_micro_batches(holder, 2)
    assert config == {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
