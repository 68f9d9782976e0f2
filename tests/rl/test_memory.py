"""What a ppo stage's memory is said to be is what is there, byte for byte, and in a real process within 15 %."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from align.capacity.estimate_training import estimate
from align.capacity.memory import Estimate, ppo_memory
from align.config.runtime import Runtime
from align.config.stages.policy_gradient import PpoConfig
from align.config.tuning import FullTuning, LoraTuning, QloraTuning
from align.inference.transformers import TransformersEngine
from align.inference.vllm import CACHE, WEIGHTS, SleepMode
from align.models.built_in import fetch, make_tiny
from align.models.compute.model_types import read_architecture
from align.models.compute.precision import cast_frozen_to_bf16
from align.models.loading import load_reward
from align.rl.evaluations import rest_base

LORA = LoraTuning(rank=4)


class Weigh(TrainerCallback):
    """Bytes of all that is there before the second optimizer step: then gradients and AdamW's state both are."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.reward: Any = None
        self.found: dict[str, int] = {}
        self.others = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1:
            return
        model = self.trainer.model
        policy, critic = list(model.policy.parameters()), list(model.critic.parameters())
        reference = [] if model.reference is None else list(model.reference.parameters())
        parts = {
            "weights": policy,
            "gradients": [p.grad for p in policy],
            "optimizer": self._state(policy),
            "reference": reference,
            "reward": list(self.reward.parameters()),
            "engine": list(self.trainer.engine.model.parameters()),
            "critic": [*critic, *(p.grad for p in critic), *self._state(critic)],
        }
        observations: set[int] = set()
        self.found = {name: _bytes(tensors, observations) for name, tensors in parts.items()}
        self.others = _bytes(_all_tensors(), observations)

    def _state(self, parameters: list[Any]) -> list[Any]:
        state = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer).state
        values = [value for p in parameters if p in state for value in state[p].values()]
        return [value for value in values if isinstance(value, torch.Tensor) and value.dim()]  # not the step count


def _all_tensors() -> list[Any]:
    gc.collect()
    return [result for result in gc.get_objects() if isinstance(result, torch.Tensor)]


def _bytes(tensors: list[Any], observations: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage().data_ptr() not in observations:
            observations.add(tensor.untyped_storage().data_ptr())
            total += tensor.untyped_storage().nbytes()
    return total


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("critic", ["reward", "policy", "head"])
@pytest.mark.parametrize("tuning", [FullTuning(), LORA], ids=["full", "lora"])
def test_the_count_is_what_is_there(make_trainer, tiny_model, tiny_reward, monkeypatch, tuning, critic, precision):
    before = _bytes(_all_tensors(), set())
    reward = load_reward(tiny_reward).requires_grad_(False)
    monkeypatch.setattr("tests.rl.conftest.load_reward", lambda folder: reward)
    weigh = Weigh()
    engine = TransformersEngine(tiny_model, device=torch.device("cpu"), dtype=torch.bfloat16, batch_size=64)
    low = precision == "bfloat16"
    weigh.trainer = make_trainer(tuning=tuning, reward=True, critic=critic, engine=engine, callbacks=[weigh], bf16=low)
    weigh.reward = reward
    if low:
        cast_frozen_to_bf16(reward.model)  # as the stage does
    weigh.trainer.train()
    sizes = read_architecture(tiny_model / "config.json")
    counted = ppo_memory(sizes, [sizes], tuning=tuning, critic=critic, precision=precision)
    counted = replace(counted, engine=2 * sizes.parameters)
    assert weigh.found == {name: asdict(counted)[name] for name in weigh.found}
    # Nothing of size is left over: rotary tables, the rollout with its stored columns, and the micro-batch with
    # the masks of its groups.
    assert weigh.others - before < 37_000


def found_for(tiny_model: Any, **fields: Any) -> Estimate:
    sizes = read_architecture(tiny_model / "config.json")
    base = {"policy": "sft", "prompts": "data", "learning_rate": 1e-3, "reward": "reward"}
    device, rollouts = fields.pop("device", "cpu"), fields.pop("rollouts", {})
    engine = fields.pop("engine", {} if rollouts else {"name": "transformers"})
    runtime = Runtime.model_validate({"device": device, "engine": engine, "rollouts": rollouts})
    models = {"policy": [sizes]} | ({"reward": [sizes]} if "score" not in fields else {})
    config = PpoConfig.model_validate(base | fields | ({"reward": None} if "score" in fields else {}))
    return estimate(config, models, runtime)


def test_every_choice_is_there_and_the_chosen_one_is_marked(tiny_model):
    lora = found_for(tiny_model, tuning={"method": "lora", "rank": 8}, critic="head")
    assert [tuple(choice.settings.values()) for choice in lora.choices] == [
        *(("lora r8", critic) for critic in ("reward", "policy", "head")),
        *(("full", critic) for critic in ("reward", "policy", "head")),
    ]
    assert [choice.settings for choice in lora.choices if choice.chosen] == [{"tuning": "lora r8", "critic": "head"}]
    full = found_for(tiny_model, score="gold")
    assert [tuple(choice.settings.values()) for choice in full.choices] == [
        ("lora r16", "policy"), ("lora r16", "head"), ("full", "policy"), ("full", "head")
    ]  # fmt: skip
    assert [choice.settings for choice in full.choices if choice.chosen] == [{"tuning": "full", "critic": "policy"}]
    assert all(choice.memory.engine > 0 and choice.memory.kv_cache > 0 for choice in full.choices)


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"rollout_batch": 32, "micro_batch_size": 8}, "here 8 responses of up to 64 tokens and 2 prompts"),
        ({}, "The cache is for prompts of max_prompt_tokens"),
        ({"device": "cuda", "engine": {"name": "vllm"}}, "needed or not, but asleep while the trainer learns."),
        ({"device": "cuda", "engine": {"name": "vllm", "sleep": False}}, "cache, needed or not."),
        ({"rollouts": {"addresses": "http://127.0.0.1:1"}}, "their memory is not counted"),
        ({"trainer": {"reuse_forward": 0.5}}, "and of 0.5 of an optimizer step's micro-batches"),
        ({"trainer": {"optim": "adafactor"}}, "optim adafactor may need another amount"),
    ],
)
def test_what_the_numbers_leave_open_is_said(tiny_model, fields, note):
    assert note in "\n".join(found_for(tiny_model, **fields).notes)


def test_what_does_not_apply_is_not_said(tiny_model):
    notes = "\n".join(found_for(tiny_model, engine={"name": "vllm"}).notes)
    for word in ("gpu_memory", "max_prompt_tokens", "checkpointing", "reuse_forward", "optim", "server"):
        assert word not in notes


def measured(folder: Any, tmp_path: Any, *words: str) -> dict[str, float]:
    """Peak bytes of a process that makes two PPO updates, beyond its imports, and what was counted for them."""
    command = [sys.executable, "-m", "tests.support.rl.memory_run", str(folder), str(tmp_path), *words]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return document


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["reward", "head"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("model", ["embedded", "wide"])
def test_a_process_needs_what_was_counted(tmp_path, model, method, critic):
    folder = fetch() if model == "embedded" else make_tiny(tmp_path / "wide", hidden_size=1024, layers=6)
    measurement = measured(folder, tmp_path, method, critic)
    print(measurement)
    assert 0.85 <= measurement["counted"] / measurement["peak"] <= 1.15, measurement


class SharedGpu(TransformersEngine):
    """An engine that sleeps as vLLM does on a GPU, and notes where the trainer's base is while it is awake."""

    trainer: Any = None
    sleeps = 0

    def start(self, trainer: Any) -> None:
        self.trainer = trainer
        self.base = {name: p.data_ptr() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        self.sleep_mode = SleepMode(self, True)
        self.sleep_mode.sleep()

    def sleep(self, level: int) -> None:
        self.sleeps += 1

    def wake_up(self, tags: list[str]) -> None:
        parameters = dict(self.trainer.model.named_parameters())
        matrices = [name for name in self.base if parameters[name].dim() > 1]
        assert matrices and all(parameters[name].data_ptr() != self.base[name] for name in matrices)

    def load_weights(self, weights: Any) -> None:
        self.sleep_mode.wake(WEIGHTS)
        super().load_weights(weights)

    def generate(self, *arguments: Any, **options: Any) -> Any:
        with torch.inference_mode():
            self.sleep_mode.wake(WEIGHTS, CACHE)
        responses = super().generate(*arguments, **options)
        self.sleep_mode.sleep()
        return responses


@pytest.mark.parametrize("tuning", [LORA, QloraTuning(rank=4), FullTuning()], ids=lambda tuning: tuning.method)
def test_base_and_engine_take_turns_with_equal_results(make_trainer, tiny_model, tiny_reward, monkeypatch, tuning):
    def train(*parts: str) -> tuple[dict[str, torch.Tensor], SharedGpu]:
        reward = load_reward(tiny_reward).requires_grad_(False)
        monkeypatch.setattr("tests.rl.conftest.load_reward", lambda folder: reward)
        engine = SharedGpu(tiny_model, device=torch.device("cpu"), dtype=torch.float32, batch_size=64)
        options: Any = {"critic": "reward", "probe_parity": True}
        trainer = make_trainer(tuning=tuning, reward=True, engine=engine, **options)
        engine.start(trainer)
        if parts:
            rest_base(trainer, Runtime(offload=list(parts)), [reward])
        else:
            engine.wake_up = lambda tags: None  # type: ignore[method-assign]
        trainer.train()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, engine

    plain, _ = train()
    rested, engine = train("base")
    assert engine.sleeps >= 4 and plain.keys() == rested.keys()
    assert all(torch.equal(plain[name], rested[name]) for name in plain)
