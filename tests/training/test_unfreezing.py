"""Schedules of open layers: who is open when, what the optimizer holds, learning, and exact resume."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from align.config.tuning import FullTuning
from align.models.loading import load_policy, load_tokenizer, new_reward
from align.models.parameter_groups import parameter_groups
from align.pipeline.registry import STAGES
from align.training import fit
from align.training.trainers import set_layer_learning_rates
from align.training.unfreezing import layer_schedule, sample_layers, steps_per_epoch
from tests.support.training.harness import events, losses
from tests.support.training.killed_stage import Killed, dying
from tests.support.training.training_stages import make_stage

UNFREEZE = {"method": "full", "unfreeze": {"at": {0: 1, 7: 2}, "embeddings": True}}
LISA = {"method": "full", "lisa": {"layers": 1, "every": 3}}
DECAY = {"method": "full", "layer_decay": 0.5, "freeze": ["model.embed_tokens"]}
TUNINGS = {"unfreeze": UNFREEZE, "lisa": LISA, "decay": DECAY}


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the optimizer's current state."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def layers_open(opened: frozenset[Any]) -> list[int]:
    return sorted(place for place in opened if isinstance(place, int))


@pytest.mark.parametrize("unit", ["steps", "epochs"])
def test_layers_open_from_the_last_one_down(tiny_model: Path, unit: str) -> None:
    model = load_policy(tiny_model)
    index = {0: 0, 4: 1, 9: 40} if unit == "steps" else {0: 0, 0.8: 1, 1.8: 2}  # more than all layers, and just all
    tuning = FullTuning(unfreeze={"at": index, "unit": unit, "embeddings": True})  # type: ignore[arg-type]
    schedule = layer_schedule(tuning, model, steps_per_epoch=5, seed=0)
    assert [layers_open(schedule(step)) for step in (0, 3, 4, 8, 9)] == [[], [], [1], [1], [0, 1]]
    assert ["embeddings" in schedule(step) for step in (0, 8, 9)] == [False, False, True]
    assert all("head" not in schedule(step) for step in range(12))


def test_a_tied_head_opens_the_embeddings(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    schedule = layer_schedule(FullTuning(unfreeze={"at": {0: 1}, "head": True}), model, 5, 0)  # type: ignore[arg-type]
    assert "embeddings" in schedule(0)
    schedule = layer_schedule(FullTuning(unfreeze={"at": {0: 1}, "head": True}), new_reward(tiny_model), 5, 0)  # type: ignore[arg-type]
    assert "embeddings" not in schedule(0)
    assert "score" in schedule(0)


@pytest.mark.parametrize(("embeddings", "head"), [(True, False), (False, True)])
def test_lisa_opens_around_its_layers_what_it_is_told(tiny_model: Path, embeddings: bool, head: bool) -> None:
    lisa = {"layers": 1, "embeddings": embeddings, "head": head}
    schedule = layer_schedule(FullTuning(lisa=lisa), new_reward(tiny_model), 5, 0)  # type: ignore[arg-type]
    assert ("embeddings" in schedule(0), "head" in schedule(0)) == (embeddings, head)


@pytest.mark.parametrize(("processes", "steps"), [(1, 11), (2, 6), (16, 1)])
def test_an_epoch_has_the_steps_that_transformers_takes(processes: int, steps: int) -> None:
    # 41 rows by fours: 11 steps of one process, 6 of two; what is left over at the end is a step
    args = SimpleNamespace(train_batch_size=4, world_size=processes)
    assert steps_per_epoch(SimpleNamespace(args=args, train_dataset=range(41))) == steps


def test_every_layer_is_drawn_as_often_and_by_step_alone() -> None:
    draws = [sample_layers(8, 2, period, seed=3) for period in range(2000)]
    assert draws == [sample_layers(8, 2, period, seed=3) for period in range(2000)]
    assert draws != [sample_layers(8, 2, period, seed=4) for period in range(2000)]
    assert all(len(set(layers)) == 2 for layers in draws)
    times = Counter(layer for layers in draws for layer in layers)
    # 2000 draws at 1/4: 500 each, standard deviation 19.4
    assert all(abs(times[layer] - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75) for layer in range(8))
    assert sample_layers(2, 5, 0, 0) == [0, 1]


class Watch(TrainerCallback):
    """At each step: the weights with gradients, those with optimizer state, and the bytes of both."""

    def __init__(self) -> None:
        self.seen: list[tuple[set[str], set[str], int]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.graded = {name for name, p in kwargs["model"].named_parameters() if p.grad is not None}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer
        named = {id(p): name for name, p in kwargs["model"].named_parameters()}
        self.seen.append((self.graded, {named[id(p)] for p in optimizer.state}, optimizer_bytes(optimizer)))


class Rates(TrainerCallback):
    """The learning rate of every weight in the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            groups = kwargs["optimizer"].param_groups
            rates = {id(p): group["lr"] for group in groups for p in group["params"]}
            self.found = {name: rates[id(p)] for name, p in kwargs["model"].named_parameters() if p.requires_grad}


def added(callback: TrainerCallback, monkeypatch: pytest.MonkeyPatch) -> None:
    """``callback`` is among those of every run."""
    extra = fit.extra_callbacks
    monkeypatch.setattr(fit, "extra_callbacks", lambda *inputs: [*extra(*inputs), callback])


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    result = Watch()
    added(result, monkeypatch)
    return result


@pytest.mark.parametrize("name", ["unfreeze", "lisa"])
def test_only_what_is_open_has_gradients_and_optimizer_state(
    name: str, tiny_model: Path, tmp_path: Path, watch: Watch
) -> None:
    run = make_stage("sft", tmp_path, tiny_model, TUNINGS[name], max_steps=12)
    metrics = STAGES["sft"].runner()(run)
    model = load_policy(tiny_model)
    where = parameter_groups(model)
    schedule = layer_schedule(run.config.tuning, model, 5, run.seed)
    for step, (graded, held, _) in enumerate(watch.seen):
        wanted = {name for name, place in where.items() if place in schedule(step)}
        assert graded == held == wanted, step
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    most = max(sum(sizes[n] for n in held) for _, held, _ in watch.seen)
    assert metrics["trainable_parameters"] == most
    # two float32 averages a weight, and a step count a tensor
    assert [remaining for _, _, remaining in watch.seen] == [
        sum(8 * sizes[n] + 4 for n in held) for _, held, _ in watch.seen
    ]
    shown = {event["step"]: event["weights_open"] for event in events(run, "metrics") if "weights_open" in event}
    assert set(shown) <= ({1, 8} if name == "unfreeze" else {1, 4, 7, 10})
    assert shown[1] == sum(sizes[n] for n in watch.seen[0][1])


def test_closed_layers_stay_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    run = make_stage("sft", tmp_path, tiny_model, UNFREEZE, max_steps=6, weight_decay=0.1)
    STAGES["sft"].runner()(run)
    before, after = (load_file(f / "model.safetensors") for f in (tiny_model, run.output / "model"))
    changed = {name for name in after if not after[name].equal(before[name])}
    assert {name.split(".")[2] for name in changed if ".layers." in name} == {"1"}
    assert "model.embed_tokens.weight" not in changed
    assert "model.norm.weight" in changed


@pytest.mark.parametrize("name", TUNINGS)
def test_it_learns(name: str, tiny_model: Path, tmp_path: Path) -> None:
    run = make_stage("sft", tmp_path, tiny_model, TUNINGS[name], learning_rate=1e-2, epochs=12)
    metrics = STAGES["sft"].runner()(run)
    assert metrics["test_loss_after"] < metrics["test_loss_before"] / 2
    model = load_policy(run.output / "model").eval()
    assert load_tokenizer(run.output / "model").eos_token == "<|im_end|>"
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize(
    ("kind", "name", "save_steps", "dies_at"),
    [
        ("sft", "lisa", 4, 10),  # inside a period
        ("dpo", "lisa", 3, 8),  # at a switch
        ("reward", "unfreeze", 7, 9),  # at a switch
        ("sft", "unfreeze", 4, 10),
        ("sft", "decay", 4, 10),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    kind: str, name: str, save_steps: int, dies_at: int, tiny_model: Path, tmp_path: Path
) -> None:
    run = STAGES[kind].runner()
    fields = {"save_steps": save_steps, "max_steps": 12}
    uninterrupted, parts = (make_stage(kind, tmp_path / f, tiny_model, TUNINGS[name], **fields) for f in ("a", "b"))
    first = run(uninterrupted)
    with pytest.raises(Killed):
        run(dying(parts, dies_at))
    metrics = run(parts)
    assert metrics["resumed_from_step"] == dies_at - 2
    assert metrics["trainable_parameters"] == first["trainable_parameters"]
    assert losses(parts) == losses(uninterrupted)
    expected, actual = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert all(expected[weight].equal(actual[weight]) for weight in expected)


def test_rates_fall_from_the_last_layer_to_the_embeddings(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    decaying = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decaying, "weight_decay": 0.1}, {"params": rest}], lr=8e-3)
    set_layer_learning_rates(optimizer, model, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert named["model.norm.weight"] == named["model.layers.1.mlp.up_proj.weight"] == 8e-3
    assert named["model.layers.1.input_layernorm.weight"] == 8e-3
    assert named["model.layers.0.mlp.up_proj.weight"] == named["model.layers.0.input_layernorm.weight"] == 4e-3
    assert named["model.embed_tokens.weight"] == 2e-3
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.1 if p.dim() > 1 else 0.01) for p in model.parameters())  # AdamW's default is 0.01


def test_a_run_learns_at_these_rates(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates()
    added(rates, monkeypatch)
    STAGES["sft"].runner()(make_stage("sft", tmp_path, tiny_model, DECAY, max_steps=2))
    assert rates.found["model.norm.weight"] == rates.found["model.layers.1.mlp.up_proj.weight"] > 0
    assert rates.found["model.layers.0.mlp.up_proj.weight"] == 0.5 * rates.found["model.norm.weight"]
    assert "model.embed_tokens.weight" not in rates.found
