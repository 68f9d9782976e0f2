"""A process trains on one device however many the machine has: no ``nn.DataParallel``, and no more rows a step.

A machine with four devices is played by torch's count of them. The tensors stay on the CPU, which transformers falls
back to; the number of devices goes into its arguments all the same.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.training_args import OptimizerNames

import align.rl
import align.stages.rl
import align.training.arguments
from align.config.runtime import Runtime
from align.errors import UserError
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.rl.arguments import rollout_arguments
from align.rl.trainer import RLTrainer
from align.stages import distill, dpo, evaluate, kto, pretrain, reference_free, reward, sft
from align.training.arguments import offload_options, starts_with_recomputation
from tests.support.rl import stages as sampled
from tests.support.stages.evaluation_stage import context, inputs
from tests.support.training import aimed_stages
from tests.support.training.kills import assert_same, run

__all__ = ["context", "inputs"]  # fixtures


class Built(Exception):
    """Carries a trainer out of its stage before it trains."""


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for module in (align.training.arguments, align.stages.rl):
        monkeypatch.setattr(module, "device_of", lambda runtime: torch.device("cuda"))


def check(trainer: Any, rows: int) -> None:
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == trainer._train_batch_size == rows
    assert not isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel)


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("kind", aimed_stages.KINDS)
def test_a_stage_on_rows_builds_its_trainer_for_one(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(trainer: Any, *args: Any, **options: Any) -> None:
        raise Built(trainer)

    for module in (distill, dpo, kto, pretrain, reference_free, reward, sft):
        monkeypatch.setattr(module, "fit", stop)
    stage = aimed_stages.make_stage(kind, tmp_path, tiny_model, max_steps=1)
    with pytest.raises(Built) as built:
        run(stage)
    check(built.value.args[0], stage.config.batch_size)


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("kind", sampled.KINDS)
def test_a_stage_that_samples_builds_its_trainer_for_one(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Any, *args: Any, **options: Any) -> None:
        raise Built(self)

    monkeypatch.setattr(RLTrainer, "train", stop)
    stage = sampled.make_stage(kind, tmp_path, tiny_model)
    with pytest.raises(Built) as built:
        run(stage)
    check(built.value.args[0], stage.config.micro_batch)


@pytest.mark.parametrize(("tests", "kind"), [(aimed_stages, "cpo"), (sampled, "ppo")], ids=["cpo", "ppo"])
def test_the_machine_s_devices_change_nothing(
    tests: Any, kind: str, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """These two are trained by ``DataParallel`` without a word; trl's own trainers refuse it."""
    fields = {"max_steps": 3} if tests is aimed_stages else {"updates": 2}
    plain, several = (tests.make_stage(kind, tmp_path / name, tiny_model, **fields) for name in ("plain", "several"))
    expected = run(plain)
    request.getfixturevalue("four_devices")
    assert_same(plain, several, expected, run(several))


def test_every_kind_that_trains_is_among_those_above() -> None:
    assert {kind for kind, stage in STAGES.items() if stage.distributed} == {*aimed_stages.KINDS, *sampled.KINDS}


@pytest.mark.usefixtures("four_devices")
def test_sampling_and_scoring_use_no_other_device(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation samples, and runs policies, the reference and the reward model over the responses."""

    def refuse(*args: Any, **options: Any) -> None:
        pytest.fail("a model was copied to several devices")

    monkeypatch.setattr(torch.nn.DataParallel, "__init__", refuse)
    monkeypatch.setattr(torch.nn.parallel, "data_parallel", refuse)
    assert evaluate.run(context)["tokens"] > 0


CONFIGS = [name for name in align.rl.__all__ if name.endswith("Config")]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_script_s_own_config_is_for_one(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = getattr(align.rl, name).for_trainer(
        rollout_batch=8, samples_per_prompt=4, micro_batch_size=2, learning_rate=1e-6, num_mini_batches=1
    )
    arguments = rollout_arguments(config, output_dir=str(tmp_path), report_to="none")
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 2)


def test_a_process_without_devices_has_none(tmp_path: Path) -> None:
    config = align.rl.PpoConfig.for_trainer(learning_rate=1e-6)
    assert rollout_arguments(config, output_dir=str(tmp_path), use_cpu=True, report_to="none").n_gpu == 0


def options_for(optim: str, *parts: str, on_gpu: bool = True) -> dict[str, Any]:
    config = SimpleNamespace(trainer={"optim": optim, "gradient_checkpointing_kwargs": {"every_n_layers": 2}})
    runtime = Runtime.model_validate({"offload": list(parts)})
    context: Any = SimpleNamespace(name="sft", config=config, runtime=runtime)
    return offload_options(context, on_gpu)


def test_options_offload_what_the_settings_name() -> None:
    assert options_for("adamw_8bit", "optimizer") == {"optim": "paged_adamw_8bit"}
    assert OptimizerNames("paged_adamw_8bit") == OptimizerNames.PAGED_ADAMW_8BIT
    assert options_for("paged_adamw_32bit", "optimizer") == options_for("adamw_8bit") == {}
    recomputed = options_for("adamw_torch", "activations")
    kept = {"every_n_layers": 2, "offload": True}
    assert recomputed == {"gradient_checkpointing_kwargs": kept}
    config = align.rl.GrpoConfig.for_trainer(learning_rate=1e-6, gradient_checkpointing=False)
    assert starts_with_recomputation(config, None, recomputed)
    assert not starts_with_recomputation(config, None, {})
    assert kept.keys() <= inspect.signature(PreTrainedModel.gradient_checkpointing_enable).parameters.keys()
    assert options_for("adamw_8bit", "optimizer", "activations", "base", on_gpu=False) == {}


def test_offloaded_activations_are_recomputed_in_rl(tmp_path: Path) -> None:
    config = align.rl.GrpoConfig.for_trainer(learning_rate=1e-6, gradient_checkpointing=False)
    offload = options_for("adamw_torch", "activations")
    arguments = rollout_arguments(config, output_dir=str(tmp_path), use_cpu=True, report_to="none", **offload)
    assert arguments.gradient_checkpointing and arguments.gradient_checkpointing_kwargs["offload"]
    assert not rollout_arguments(config, output_dir=str(tmp_path), use_cpu=True).gradient_checkpointing


def test_state_without_pages_is_refused() -> None:
    with pytest.raises(UserError, match=r"sft: runtime.offload names optimizer, and adamw_torch has no paged state"):
        options_for("adamw_torch", "optimizer")
