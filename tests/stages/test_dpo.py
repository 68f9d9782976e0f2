"""Stage dpo, end to end on a tiny model: the chosen answers become likelier than the rejected ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.config.stages.preference import DpoConfig
from align.models.loading import load_policy, load_tokenizer
from align.stages.dpo import run
from align.store.artifacts import Kind
from align.training.rows import encode_pairs
from tests.support.training.harness import context, data_artifact, events, losses, rows


def margin(folder: Path) -> float:
    """Mean log-probability of chosen minus rejected, in nats."""
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    total = 0.0
    for row in encode_pairs(tokenizer, rows(12, start=40), 128).rows:
        for side, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.no_grad():
                logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            total += sign * float(logprobs[-len(row[side]) :].sum())
    return total / 12


@pytest.mark.parametrize(
    ("tuning", "loss"),
    [({"method": "full"}, "sigmoid"), ({"method": "lora", "rank": 8}, "sigmoid"), ({"method": "full"}, "ipo")],
    ids=["full", "lora", "ipo"],
)
def test_it_prefers_what_it_was_shown(tuning: dict[str, object], loss: str, tiny_model: Path, tmp_path: Path) -> None:
    config = DpoConfig(
        policy="model",
        data="data",
        tuning=tuning,
        loss=loss,
        beta=0.2,
        learning_rate=3e-3,
        epochs=3,
        batch_size=8,
        max_length=128,
        precision="float32",
    )
    stage = context(tmp_path, config, tiny_model, data_artifact(tmp_path / "data", Kind.PREFERENCES), "policy")
    metrics = run(stage)
    assert metrics["test_accuracy_after"] == 1.0
    assert metrics["pairs"] == 40
    moved = margin(stage.output / "model") - margin(tiny_model)
    # trl's margin is beta times the change of the log-probability gap, against the reference before training.
    assert 0.2 * moved == pytest.approx(metrics["test_margin_after"], rel=1e-3)
    # Before the first step every margin is 0: ln 2 for the sigmoid, (0 - 1 / (2 * 0.2))^2 for IPO.
    assert losses(stage)[1] == pytest.approx({"sigmoid": 0.693147, "ipo": 6.25}[loss], abs=1e-4)
    assert any(event["unit"] == "reference answers" for event in events(stage, "progress"))


def test_an_sft_term_adds_the_chosen_answers_loss_per_token(tiny_model: Path, tmp_path: Path) -> None:
    config = DpoConfig(
        policy="model",
        data="data",
        sft_weight=0.5,
        learning_rate=1e-4,
        max_steps=1,
        batch_size=40,
        micro_batch_size=40,
        max_length=128,
        precision="float32",
    )
    stage = context(tmp_path, config, tiny_model, data_artifact(tmp_path / "data", Kind.PREFERENCES), "policy")
    run(stage)
    model, total, count = load_policy(tiny_model), 0.0, 0
    for row in encode_pairs(load_tokenizer(tiny_model), rows(40), 128).rows:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        total -= float(logprobs[-len(row["chosen_ids"]) :].sum())
        count += len(row["chosen_ids"])
    assert losses(stage)[1] == pytest.approx(0.693147 + 0.5 * total / count, rel=1e-4)
