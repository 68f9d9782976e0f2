"""Stage reward, end to end on a tiny model: it tells right from wrong, and what it writes scores as it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.checks.stage import check_output
from align.config.stages.reward import RewardConfig
from align.data.rows import write_rows
from align.models.loading import load_reward, load_tokenizer
from align.stages.reward import run
from align.store.artifacts import Kind
from align.training import held_out, save
from align.training.held_out import pair_accuracy
from align.training.rows import encode_conversations
from align.training.trainers import score_in_float32
from tests.support.refusals import Refused
from tests.support.training.harness import context, data_artifact, rows, warnings

TUNINGS = {"full": {"method": "full"}, "lora": {"method": "lora", "rank": 8}}


def config(**fields: object) -> RewardConfig:
    return RewardConfig(model="model", data="data", learning_rate=3e-3, batch_size=8, max_length=128, **fields)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_it_learns_the_labels_and_saves_its_head(tuning: str, tiny_model: Path, tmp_path: Path) -> None:
    stage = context(
        tmp_path,
        config(tuning=TUNINGS[tuning], epochs=3),
        tiny_model,
        data_artifact(tmp_path / "data", Kind.PREFERENCES, train=48, test=16),
    )
    metrics = run(stage)
    assert metrics["test_accuracy_after"] == 1.0 > metrics["test_accuracy_before"]
    # A quarter of the labels are wrong: agreeing with all of them is 0.75 against the truth.
    assert metrics["test_mislabeled"] == 0.25
    assert metrics["test_accuracy_true_after"] == 0.75
    assert metrics["test_length_accuracy"] == 0.0  # the wrong answers are the longer ones
    assert abs(metrics["test_score_mean_after"]) < 1  # centerd
    tokenizer = load_tokenizer(stage.output / "model")
    encoded = encode_conversations(tokenizer, rows(16, start=48), 128)
    model = load_reward(stage.output / "model")
    with torch.no_grad():
        chosen = held_out.scores(model, [row["chosen_ids"] for row in encoded.rows], tokenizer.pad_token_id)
        rejected = held_out.scores(model, [row["rejected_ids"] for row in encoded.rows], tokenizer.pad_token_id)
    assert pair_accuracy(chosen, rejected) == 1.0
    gap = sum(chosen) / 16 - sum(rejected) / 16
    assert gap == pytest.approx(metrics["test_margin_after"], rel=0.02)


def test_a_head_that_was_not_saved_is_noticed(
    refused: Refused, tiny_model: Path, tiny_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "load_reward", lambda folder: load_reward(tiny_reward))
    stage = context(tmp_path, config(max_steps=1), tiny_model, data_artifact(tmp_path / "data", Kind.PREFERENCES))
    refused(run, stage)


def test_step_without_a_learning_rate_is_named(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    """The only step is the warm-up, since all pairs but one are too long."""
    pairs = rows(16)
    long = [{**row, "rejected": [{"role": "assistant", "content": "y" * 200}]} for row in pairs[1:]]
    data = data_artifact(tmp_path / "data", Kind.PREFERENCES, train=16, test=4)
    write_rows(data.split("train"), [pairs[0], *long])
    stage = context(tmp_path, config(long_rows="skip"), tiny_model, data)
    metrics = run(stage)
    assert metrics["untrained"].startswith("the learning rate was 0 in its only step, of the warm-up")
    assert metrics["skipped_rows"] == ["15 of 16 train rows skipped: longer than max_length"]
    assert any("nothing was learned: the learning rate was 0" in text for text in warnings(stage))
    refused(check_output, stage, "reward", Kind.REWARD, metrics)


def test_padding_moves_no_score_and_the_head_stays_float32(tiny_reward: Path) -> None:
    model, tokenizer = load_reward(tiny_reward), load_tokenizer(tiny_reward)
    ids = [row["chosen_ids"] for row in encode_conversations(tokenizer, rows(6), 128).rows]
    with torch.no_grad():
        together = held_out.scores(model, ids, tokenizer.pad_token_id)
        alone = [held_out.scores(model, [row], tokenizer.pad_token_id)[0] for row in ids]
    assert together == pytest.approx(alone, abs=1e-5)
    score_in_float32(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = held_out.scores(model, ids, tokenizer.pad_token_id)
    assert any(torch.tensor(score).bfloat16().item() != score for score in narrow)


def test_ties_are_half_right() -> None:
    assert pair_accuracy([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == (1 + 0.5 + 0 + 1) / 4
