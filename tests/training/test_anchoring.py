"""Anchors to the start: the arithmetic of the pull and of the KL term, what they hold, and exact resume."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import nn

from align.config.stages.reward import RewardConfig
from align.config.stages.sft import SftConfig
from align.config.tuning import AdaptersTuning, LoraTuning, Tuning
from align.config.validation import validate
from align.errors import UserError
from align.models.fast.token_logprobs import PLAIN, LogitTransform
from align.models.loading import load_policy, load_reward
from align.models.tuning.apply import apply_tuning
from align.pipeline.registry import STAGES
from align.training.divergence import CHUNK, summed_kl, trunk_and_head
from align.training.forgetting import KLToStart, PullToStart
from align.training.micro_batches import SHARE
from align.training.preference_trainers import PreparedDPO
from align.training.sft_trainer import NoisyEmbeddings
from tests.support.models.scaled_logits import make_scaling_model
from tests.support.models.tuning.confident_model import saved
from tests.support.training.harness import events, losses
from tests.support.training.killed_stage import Killed, dying
from tests.support.training.training_stages import make_stage

FULL: dict[str, Any] = {"method": "full"}
LORA = {"method": "lora", "rank": 4}


def test_the_pull_is_a_share_of_the_way_back() -> None:
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0], [5.0]])
    anchor = PullToStart(layer, strength=2.0)
    layer.weight.data = torch.tensor([[3.0], [5.0]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    settings: Any = {"args": None, "state": None, "control": None, "optimizer": optimizer}
    anchor.on_pre_optimizer_step(**settings)  # no gradient: the weight is closed
    assert layer.weight.tolist() == [[3.0], [5.0]]
    layer.weight.grad = torch.zeros(2, 1)
    anchor.on_pre_optimizer_step(**settings)
    # 3 - 0.1 * 2 * (3 - 1) = 2.6
    assert layer.weight.flatten().tolist() == pytest.approx([2.6, 5.0])
    # |(1.6, 0)| / |(1, 5)|
    assert anchor.facts()["moved"] == pytest.approx(1.6 / 26**0.5)


def test_the_pull_goes_no_further_than_the_start() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    anchor = PullToStart(layer, strength=50.0)
    layer.weight.data.fill_(3.0)
    layer.weight.grad = torch.zeros(1, 1)
    settings: Any = {
        "args": None,
        "state": None,
        "control": None,
        "optimizer": torch.optim.SGD(layer.parameters(), 0.1),
    }
    anchor.on_pre_optimizer_step(**settings)  # a rate of 0.1 times 50 is five times the way back
    assert layer.weight.item() == 1.0


class Holder:
    """What the term reads of a trainer, in a step with ``tokens`` answer tokens."""

    def __init__(self, model: Any, tokens: int) -> None:
        self.model, self.step_tokens = model, tokens
        self.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
        self.metrics: list[float] = []

    def add_metric(self, name: str, value: float) -> None:
        self.metrics.append(value)


def test_term_is_independent_of_processes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows with 8, 1, 3 and 2 answer tokens as one micro-batch, and in two processes with two each."""
    model = load_policy(tiny_model)
    start = KLToStart(Holder(model, 0), 1.0, low=False)
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.5, 2, len(model.model.norm.weight)))
    ids = torch.arange(40, 80).view(4, 10)
    mask = torch.tensor([[0] * (10 - count) + [1] * count for count in (8, 1, 3, 2)])

    def term(rows: list[int]) -> float:
        inputs = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "completion_mask": mask[rows]}
        with start.watching():
            model(input_ids=ids[rows])
        return float(start.loss(Holder(model, 14), model, inputs).detach())

    together = term([0, 1, 2, 3])
    assert together > 1e-3
    monkeypatch.setattr("align.training.trainers.world_size", lambda: 2)
    # Each process has two micro-batches of a row. The sum over both processes is halved.
    parts = [term([row]) / 2 for row in range(4)]
    assert sum(parts) == pytest.approx(together, rel=1e-4)


def test_step_tokens_are_those_of_all_answers() -> None:
    trainer = object.__new__(PreparedDPO)
    trainer.terms = [object()]
    trainer.model_accepts_loss_kwargs, trainer.compute_loss_func = False, None
    batch = {"completion_mask": torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]])}
    # 2 + 1 places predict an answer's token; a copy's are those of the micro-batch that it repeats.
    copy = {**batch, SHARE: torch.tensor(0.0)}
    trainer.memory = SimpleNamespace(rows=2)
    step = SimpleNamespace(micro_batches=lambda size: [batch, batch, copy])
    trainer._get_num_items_in_batch([step], torch.device("cpu"))
    assert trainer.step_tokens == 6


@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(scale=0.5, cap=3.0)])
def test_kl_in_chunks_is_that_of_whole_distributions(transform: LogitTransform) -> None:
    torch.manual_seed(0)
    count = CHUNK + 7
    base, hidden = torch.randn(count, 8), torch.randn(count, 8, requires_grad=True)
    base_head, head = nn.Linear(8, 11, bias=False), nn.Linear(8, 11, bias=False)
    actual = summed_kl(base, base_head, hidden, head, transform)
    actual.backward()
    got = (hidden.grad, head.weight.grad)
    hidden.grad, head.weight.grad = None, None

    def transformed(logits: torch.Tensor) -> torch.Tensor:
        return logits if transform is PLAIN else 3 * torch.tanh(0.5 * logits / 3)

    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=transformed(base_head(base)).detach()),
        torch.distributions.Categorical(logits=transformed(head(hidden))),
    ).sum()
    wanted.backward()
    assert float(actual) == pytest.approx(float(wanted), rel=1e-5)
    assert torch.allclose(got[0], hidden.grad, atol=1e-5)
    assert torch.allclose(got[1], head.weight.grad, atol=1e-4)
    assert base_head.weight.grad is None


@pytest.mark.parametrize(("to", "tuning"), [("l2", LORA), ("kl", FULL)])
def test_an_anchored_model_learns_and_stays_nearer(
    to: str, tuning: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    weight = {"l2": 200.0, "kl": 6.0}[to]
    fields = {"learning_rate": 5e-3, "max_steps": 15, "epochs": 9, "precision": "float32"}
    free = make_stage("sft", tmp_path / "free", tiny_model, tuning, **fields)
    held = make_stage("sft", tmp_path / "held", tiny_model, tuning, anchor={"to": to, "weight": weight}, **fields)
    free_metrics, held_metrics = STAGES["sft"].runner()(free), STAGES["sft"].runner()(held)
    assert held_metrics["test_loss_after"] < held_metrics["test_loss_before"] - 0.3
    assert held_metrics["test_loss_after"] > free_metrics["test_loss_after"]
    start = load_policy(tiny_model)
    ids = torch.tensor([list(range(40, 90))])

    def drift(folder: Path) -> float:
        with torch.no_grad():
            base, now = (m(ids).logits.log_softmax(-1) for m in (start, load_policy(folder)))
        return float((base.exp() * (base - now)).sum(-1).mean())

    assert drift(held.output / "model") < 0.7 * drift(free.output / "model")
    if to == "kl":
        shown = [e["kl_to_start"] for e in events(held, "metrics") if "kl_to_start" in e]
        assert len(shown) == 15
        assert shown[0] == pytest.approx(0, abs=1e-5)
        assert max(shown) > 0.05
    else:
        assert held_metrics["moved"] > 0


@pytest.mark.parametrize("scales", [False, True])
def test_the_term_is_a_mean_over_the_answers_tokens(tiny_model: Path, tmp_path: Path, scales: bool) -> None:
    """A micro-batch like DPO's against distributions computed in full; halves of it add up."""
    folder = make_scaling_model(tmp_path) if scales else tiny_model
    model = load_policy(folder)

    trainer = Holder(model, tokens=9)
    term = KLToStart(trainer, 2.0, low=False)
    start = load_policy(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    ids = torch.arange(40, 60).view(2, 10)
    mask = torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [1] * 3])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    with torch.no_grad():
        base, now = (m(ids).logits.log_softmax(-1) for m in (start, model))
    each = (base.exp() * (base - now)).sum(-1)[:, :-1]  # (B, T - 1)
    wanted = float(each[mask[:, 1:] == 1].mean())

    def value(settings: dict[str, torch.Tensor]) -> float:
        with term.watching():
            model(**{name: tensor for name, tensor in settings.items() if name != "completion_mask"})
        return float(term.loss(trainer, model, settings))

    assert value(inputs) == pytest.approx(2 * wanted, rel=1e-4)
    assert trainer.metrics == [pytest.approx(wanted, rel=1e-4)]
    halves = [{name: tensor[index : index + 1] for name, tensor in inputs.items()} for index in (0, 1)]
    assert sum(value(half) for half in halves) == pytest.approx(2 * wanted, rel=1e-4)
    labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(mask == 0, -100)}
    with term.watching():
        model(input_ids=ids)
    assert float(term.loss(trainer, model, labels)) == pytest.approx(2 * wanted, rel=1e-4)


@pytest.mark.parametrize(("kind", "to", "tuning"), [("dpo", "kl", LORA), ("sft", "kl", FULL), ("reward", "l2", FULL)])
def test_resumed_run_equals_the_uninterrupted_one(
    kind: str, to: str, tuning: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    run = STAGES[kind].runner()
    fields = {"max_steps": 8, "save_steps": 4, "anchor": {"to": to, "weight": 1.0}}
    uninterrupted, parts = (make_stage(kind, tmp_path / f, tiny_model, tuning, **fields) for f in ("a", "b"))
    run(uninterrupted)
    with pytest.raises(Killed):
        run(dying(parts, 6))
    assert run(parts)["resumed_from_step"] == 4
    assert losses(parts) == losses(uninterrupted)
    expected, actual = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert all(expected[name].equal(actual[name]) for name in expected)


@pytest.mark.parametrize("tuning", [LORA, {**LORA, "init": "pissa"}, FULL], ids=["lora", "pissa", "full"])
def test_the_start_has_neither_noise_nor_dropout(tuning: dict[str, Any], tiny_model: Path) -> None:
    """They are the trained model's alone, and no random number is drawn for the start."""
    chosen: Any = TypeAdapter(Tuning).validate_python(tuning | ({"dropout": 0.5} if tuning != FULL else {}))
    model = apply_tuning(load_policy(tiny_model), chosen, 0)
    trunk, head = trunk_and_head(model)
    settings = {"input_ids": torch.arange(40, 60).view(2, 10)}
    expected = load_policy(tiny_model).model(**settings).last_hidden_state
    NoisyEmbeddings(model, 50.0)
    term = KLToStart(type("T", (), {"model": model}), 1.0, low=False)
    model.train()
    trunk.layers[1].eval()
    training = [module.training for module in model.modules()]
    rng_state = torch.get_rng_state()
    states, _ = term._start(trunk, head, settings)
    assert torch.allclose(states, expected, atol=1e-5)
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert not torch.allclose(trunk(**settings).last_hidden_state, expected, atol=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stored_adapter_is_held_to_what_it_was(precision: str, tiny_model: Path, tmp_path: Path) -> None:
    """The start's pass comes between the model's forward and backward pass, and changes none of its numbers."""
    stored = AdaptersTuning(size=16, position="sequential")
    source = saved(tiny_model, stored, tmp_path / "source" / "model")
    fields: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2, "precision": precision}
    tuning = stored.model_dump(exclude_defaults=True) | {"method": "adapters"}
    held, free = (
        make_stage("sft", tmp_path / name, source, tuning, anchor=anchor, **fields)
        for name, anchor in (("held", {"to": "kl", "weight": 1e-6}), ("free", None))
    )
    for stage in (held, free):
        STAGES["sft"].runner()(stage)
    assert list(losses(held).values()) == pytest.approx(list(losses(free).values()), rel=1e-4)
    drift = [event["kl_to_start"] for event in events(held, "metrics") if "kl_to_start" in event]
    assert drift[0] == pytest.approx(0, abs=1e-5)
    assert drift[-1] > 1e-3


def test_a_reward_model_has_no_distributions(tiny_reward: Path) -> None:
    with pytest.raises(UserError, match="a reward model has none; set `to: l2`"):
        KLToStart(type("T", (), {"model": load_reward(tiny_reward)}), 1.0, low=False)
    settings = {"model": "m", "data": "d", "learning_rate": 1e-3, "anchor": {"to": "kl", "weight": 1}}
    with pytest.raises(UserError, match="a reward model has none; set `to: l2`"):
        validate(RewardConfig, settings, "p.yaml: stages.reward")


@pytest.mark.parametrize(
    ("is_tied", "settings"),
    [
        (False, {"targets": ["lm_head"]}),
        (False, {"save_modules": ["lm_head"]}),
        (True, {"save_modules": ["embed_tokens"]}),
    ],
)
def test_a_head_that_is_adapted_or_trained_is_refused(is_tied: bool, settings: Any, tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    if not is_tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model = apply_tuning(model, LoraTuning(rank=2, **settings), 0)
    with pytest.raises(UserError, match="out of targets, save_modules and train_tokens, or set `to: l2`"):
        KLToStart(type("T", (), {"model": model}), 1.0, low=False)


def test_trained_tokens_are_refused() -> None:
    settings = {"model": "m", "data": "d", "learning_rate": 1e-3, "anchor": {"to": "kl", "weight": 1}}
    tuning = {"method": "lora", "rank": 2, "train_tokens": ["<|im_start|>"]}
    with pytest.raises(UserError, match=r"anchor: kl does not go with tuning\.train_tokens"):
        validate(SftConfig, {**settings, "tuning": tuning}, "p.yaml: stages.sft")
    validate(SftConfig, {**settings, "tuning": tuning, "anchor": {"to": "l2", "weight": 1}}, "p.yaml: stages.sft")


@pytest.mark.parametrize(("key", "hint"), [("weigth", "weight"), ("too", "to")])
def test_misspelled_keys_are_refused(key: str, hint: str) -> None:
    settings = {"model": "m", "data": "d", "learning_rate": 1e-3, "anchor": {"to": "l2", "weight": 1, key: 1}}
    with pytest.raises(UserError, match=rf"anchor: unknown key '{key}'. Did you mean '{hint}'\?"):
        validate(SftConfig, settings, "p.yaml: stages.sft")
