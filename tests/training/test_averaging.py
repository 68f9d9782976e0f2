"""The average of the weights: its numbers, that it is what is scored and saved, and exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from align.models.loading import load_policy
from align.pipeline.registry import STAGES
from align.training import fit
from align.training.averaging import FILE, AverageWeights, decay_at
from tests.support.training.harness import events, losses
from tests.support.training.killed_stage import Killed, dying
from tests.support.training.training_stages import make_stage

WEIGHT = "model.layers.1.mlp.up_proj.weight"
FULL: dict[str, Any] = {"method": "full"}
LORA = {"method": "lora", "rank": 4}


class Raw(TrainerCallback):
    """Keeps the trained weights of each step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(kwargs["model"].get_parameter(WEIGHT).detach().clone())


def test_the_decay_rises_to_what_was_asked_for() -> None:
    assert [decay_at(step, 0.9) for step in (1, 8)] == [2 / 11, 9 / 18]
    assert decay_at(80, 0.9) == 0.9  # 81 / 90
    assert decay_at(10_000, 0.9) == 0.9


def test_average_moves_by_its_share_of_each_step() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = AverageWeights(model, 0.9)
    # The decays of the first steps are 2/11 and 3/12: 0 + 9/11 x 11 = 9, and 9 + 3/4 x (13 - 9) = 12.
    for step, weight, expected in ((1, 11.0, 9.0), (2, 13.0, 12.0)):
        torch.nn.init.constant_(model.weight, weight)
        average.on_step_end(None, TrainerState(global_step=step), TrainerControl())
        assert average.averages["weight"].item() == pytest.approx(expected)


def test_the_average_is_scored_and_saved(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, extra = Raw(), fit.extra_callbacks
    monkeypatch.setattr(fit, "extra_callbacks", lambda *inputs: [*extra(*inputs), raw])
    run = make_stage("sft", tmp_path, tiny_model, FULL, max_steps=8, ema=0.6, eval_steps=4, learning_rate=1e-2)
    metrics = STAGES["sft"].runner()(run)
    wanted = load_policy(tiny_model).get_parameter(WEIGHT).detach()
    for step, weight in enumerate(raw.weights, start=1):
        decay = decay_at(step, 0.6)
        wanted = decay * wanted + (1 - decay) * weight
    saved = load_file(run.output / "model" / "model.safetensors")[WEIGHT]
    assert torch.allclose(saved, wanted, atol=1e-6)
    assert not torch.allclose(saved, raw.weights[-1], atol=1e-4)
    # the same run without averages takes the same steps, and is scored otherwise at step 4 and at the end
    plain = make_stage("sft", tmp_path / "plain", tiny_model, FULL, max_steps=8, eval_steps=4, learning_rate=1e-2)
    averaged = STAGES["sft"].runner()(plain)
    assert losses(run) == losses(plain)
    scores, others = (
        {e["step"]: e["test_loss"] for e in events(c, "metrics") if "test_loss" in e} for c in (run, plain)
    )
    assert scores[0] == others[0]
    assert scores[4] != others[4]
    assert scores[8] == metrics["test_loss_after"] != averaged["test_loss_after"]


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_resumed_run_equals_the_uninterrupted_one(tuning: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    run = STAGES["sft"].runner()
    settings = {"tuning": tuning, "ema": 0.9, "max_steps": 9, "save_steps": 4, "eval_steps": 3}
    uninterrupted, parts = (make_stage("sft", tmp_path / f, tiny_model, **settings) for f in ("a", "b"))
    run(uninterrupted)
    with pytest.raises(Killed):
        run(dying(parts, 6))
    assert (parts.checkpoints / "checkpoint-4" / FILE).is_file()
    assert run(parts)["resumed_from_step"] == 4
    assert losses(parts) == losses(uninterrupted)
    expected, actual = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert all(expected[name].equal(actual[name]) for name in expected)


def test_scoring_puts_the_weights_back_even_after_an_error(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    average = AverageWeights(model, 0.9)
    with torch.no_grad():
        model.get_parameter(WEIGHT).add_(1)
    live = model.get_parameter(WEIGHT).detach().clone()
    with pytest.raises(ValueError, match="in between"), average.scoring():
        assert not model.get_parameter(WEIGHT).equal(live)
        raise ValueError("in between")
    assert model.get_parameter(WEIGHT).equal(live)
