"""Reward models from margins, smoothed labels, scores of answers and marks on steps, end to end on a tiny model."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.evaluation.calibration import ranks
from align.methods.losses import bradley_terry
from align.methods.records import PairScores
from align.models.built_in import make_tiny_tokenizer
from align.models.reward import RewardModel, Steps, combine_steps, tokenize_steps
from align.pipeline.context import StageContext
from align.stages.reward import run
from align.store.artifacts import Kind
from align.training.held_out import pair_accuracy
from align.training.reward_trainer import NumberCollator, correlation, disjoint_pairs, number_loss
from tests.support.refusals import Refused
from tests.support.stages.stage_contexts import reward_config, reward_stage
from tests.support.training.harness import data_artifact, events, losses
from tests.support.training.killed_stage import Killed, dying
from tests.support.training.scored_rows import SEPARATOR, artifact, labeled, scored, stepwise

LORA = {"method": "lora", "rank": 8}


def test_it_learns_scores_of_answers(tiny_model: Path, tmp_path: Path) -> None:
    data = artifact(tmp_path / "data", Kind.INSTRUCTIONS, scored(64), scored(24, start=64))
    stage = reward_stage(tmp_path, tiny_model, data, objective="regression", epochs=8)
    metrics = run(stage)
    assert metrics["test_pearson_after"] > 0.9 > metrics["test_pearson_before"]
    assert metrics["test_spearman_after"] > 0.9
    assert metrics["test_accuracy_after"] > 0.9
    assert metrics["score_mean"] == pytest.approx(16)
    assert metrics["score_deviation"] == pytest.approx(math.sqrt(20))
    # A head that starts at 0 predicts the mean, whose squared error is the variance: 1 as learned.
    assert metrics["test_loss_before"] == pytest.approx(1, abs=1e-6)
    model = RewardModel(stage.output / "model", precision="float32")
    scores = model.score([[{"role": "user", "content": "Rate 1"}]] * 2, ["x", "x!!!"])
    assert scores[0] < -0.5 < 0.5 < scores[1]


def test_scores_of_pairs_are_scores_of_answers(tiny_model: Path, tmp_path: Path) -> None:
    data = data_artifact(tmp_path / "data", Kind.PREFERENCES, train=16, test=8)
    metrics = run(reward_stage(tmp_path, tiny_model, data, objective="regression", max_steps=1))
    assert metrics["answers"] == 32
    assert metrics["test_answers"] == 16
    assert metrics["test_pairs"] == 8  # of 16 answers, the lower half by score with the upper


@pytest.mark.parametrize("tuning", [{"method": "full"}, LORA], ids=["full", "lora"])
def test_it_learns_labels_as_log_odds(tuning: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    data = artifact(tmp_path / "data", Kind.UNPAIRED, labeled(48), labeled(16, start=48))
    stage = reward_stage(tmp_path, tiny_model, data, objective="regression", score_loss="bce", epochs=3, tuning=tuning)
    metrics = run(stage)
    assert metrics["test_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["test_accuracy_after"] == 1.0
    assert metrics["test_pairs"] == 8


@pytest.mark.parametrize("tuning", [{"method": "full"}, LORA], ids=["full", "lora"])
def test_it_learns_which_steps_are_right(tuning: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    data = artifact(tmp_path / "data", Kind.UNPAIRED, stepwise(48), stepwise(18, start=48))
    stage = reward_stage(
        tmp_path, tiny_model, data, objective="process", epochs=6, tuning=tuning,
        steps={"separator": SEPARATOR, "aggregate": "product"}, head_learning_rate=3e-3,
    )  # fmt: skip
    metrics = run(stage)
    assert metrics["test_accuracy_after"] == 1.0
    assert metrics["test_step_accuracy_after"] > 0.95
    assert metrics["test_answer_accuracy_min_after"] == 1.0
    assert metrics["steps_marked"] == 144
    assert metrics["test_pairs"] == 12  # 12 wrong steps of 54, each against a right one
    assert Steps.read(stage.output / "model") == Steps(SEPARATOR, "product")
    model = RewardModel(stage.output / "model", precision="float32")
    prompt = [{"role": "user", "content": "Solve\n7"}]
    good, bad, blank = model.score([prompt] * 3, ["0 ok\n1 ok\n2 ok", "0 ok\n1 no\n2 ok", "0 ok\n\n1 ok\n"])
    assert 0 <= bad < 0.3 < 0.7 < good <= 1
    assert blank > 0.7
    # The same from single passes over the conversation, cut after each step.
    ids, places = tokenize_steps(
        model.tokenizer, prompt, [{"role": "assistant", "content": "0 ok\n1 no\n2 ok"}], SEPARATOR
    )
    cut = model.score_tokens([ids[: place + 1] for place in places])
    assert bad == pytest.approx(combine_steps(cut, "product"), abs=1e-4)
    assert model.score_places([ids], [places])[0] == pytest.approx(cut, abs=1e-4)


@pytest.mark.parametrize("objective", ["process", "regression"])
def test_a_resumed_run_equals_the_uninterrupted_one(objective: str, tiny_model: Path, tmp_path: Path) -> None:
    def stage(name: str) -> StageContext:
        folder, fields = tmp_path / name / "data", {"objective": objective, "epochs": 3, "save_steps": 2}
        if objective == "process":
            data = artifact(folder, Kind.UNPAIRED, stepwise(24), stepwise(6, start=24))
            fields |= {"steps": {"separator": SEPARATOR}}
        else:
            data = artifact(folder, Kind.INSTRUCTIONS, scored(24), scored(6, start=24))
        return reward_stage(tmp_path / name, tiny_model, data, tuning=LORA, **fields)

    uninterrupted, parts = stage("whole"), stage("parts")
    run(uninterrupted)
    with pytest.raises(Killed):
        run(dying(parts, 5))
    assert run(parts)["resumed_from_step"] == 4
    assert losses(parts) == losses(uninterrupted)
    expected, resumed = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert all(expected[name].equal(resumed[name]) for name in expected)


def test_margins_and_smoothing_change_what_is_learned(tiny_model: Path, tmp_path: Path) -> None:
    gaps = {}
    for name, fields in {"plain": {}, "margin": {"margin": 4.0}, "smooth": {"label_smoothing": 0.3}}.items():
        data = data_artifact(tmp_path / name / "data", Kind.PREFERENCES, train=48, test=8)
        metrics = run(reward_stage(tmp_path / name, tiny_model, data, epochs=3, center_rewards=0.0, **fields))
        gaps[name] = metrics["test_margin_after"]
    assert gaps["smooth"] < gaps["plain"] < gaps["margin"]
    # With a share e of wrong labels the best gap is log((1 - e) / e): there the loss has its least.
    assert 0 < gaps["smooth"] < 2 * math.log(0.7 / 0.3)


def test_the_loss_of_pairs_by_hand() -> None:
    pairs = PairScores(torch.tensor([2.0]), torch.tensor([0.5]), margins=torch.tensor([0.5]))
    # x = 2 - 0.5 - 0.5 = 1: 0.9 * -log s(1) + 0.1 * -log s(-1) = 0.9 * 0.313262 + 0.1 * 1.313262 = 0.413262
    assert float(bradley_terry(pairs, label_smoothing=0.1)) == pytest.approx(0.413262, abs=1e-5)


@pytest.mark.parametrize("center_rewards", [0.0, 20.0])
def test_centered_rewards_join_the_loss(center_rewards: float, tiny_model: Path, tmp_path: Path) -> None:
    data = data_artifact(tmp_path / "data", Kind.PREFERENCES, train=8, test=4)
    stage = reward_stage(tmp_path, tiny_model, data, batch_size=1, max_steps=4, center_rewards=center_rewards)
    run(stage)
    steps = [event for event in events(stage, "metrics") if "loss" in event]
    assert len(steps) == 4 and any(step["mean_reward"] ** 2 > 1e-5 for step in steps)
    for step in steps:
        # One pair a step: -log s(chosen - rejected) + coefficient * (chosen + rejected)^2, the latter twice the mean.
        plain = math.log1p(math.exp(-step["margin"]))
        assert step["loss"] == pytest.approx(plain + center_rewards * (2 * step["mean_reward"]) ** 2, abs=1e-5)


def test_the_loss_of_numbers_by_hand() -> None:
    scores, targets = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    assert float(number_loss(scores, targets, "mse", 0.0)) == pytest.approx((1 + 4) / 2)
    # log 2 = 0.693147 and log(1 + e^2) = 2.126928; smoothed by 0.1 the second is 0.9 * 2.126928 + 0.1 * 0.126928
    assert float(number_loss(scores, targets, "bce", 0.0)) == pytest.approx((0.693147 + 2.126928) / 2, abs=1e-5)
    assert float(number_loss(scores, targets, "bce", 0.1)) == pytest.approx((0.693147 + 1.926928) / 2, abs=1e-5)


def test_steps_come_to_one_score() -> None:
    logits = [0.0, math.log(3), -math.log(3)]  # chances 1/2, 3/4, 1/4
    assert combine_steps(logits, "min") == pytest.approx(0.25)
    assert combine_steps(logits, "product") == pytest.approx(0.09375)
    assert combine_steps(logits, "last") == pytest.approx(0.25)
    assert combine_steps(list(reversed(logits)), "last") == pytest.approx(0.5)
    assert combine_steps(logits, "mean") == pytest.approx(0.5)
    assert combine_steps([-1000.0], "min") == 0.0


@pytest.mark.parametrize(
    ("text", "finished", "ends"),
    [
        ("a\nbc\nd", True, ["a\n", "bc\n", "d<|im_end|>"]),
        ("a\nbc\nd", False, ["a\n", "bc\n", "d"]),
        ("a\n\n\nbc\n", True, ["a\n", "\n\nbc\n"]),
        ("é ü\nñ", True, ["é ü\n", "ñ<|im_end|>"]),
        ("one", True, ["one<|im_end|>"]),
        ("", True, ["<|im_end|>"]),
    ],
)
def test_where_steps_end(text: str, finished: bool, ends: list[str]) -> None:
    tokenizer = make_tiny_tokenizer()
    prompt, answer = [{"role": "user", "content": "p\nq"}], [{"role": "assistant", "content": text}]
    ids, places = tokenize_steps(tokenizer, prompt, answer, "\n", finished=finished)
    start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    starts = [start, *(place + 1 for place in places)]
    assert [tokenizer.decode(ids[a:b]) for a, b in pairwise(starts)] == ends


def test_a_batch_of_numbers_is_padded_on_the_right() -> None:
    batch = NumberCollator(9)([
        {"input_ids": [1, 2, 3], "places": [0, 2], "targets": [1.0, 0.0]},
        {"input_ids": [4], "places": [0], "targets": [0.5]},
    ])  # fmt: skip
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["places"].tolist() == [[0, 0], [0, 2], [1, 0]]
    assert batch["targets"].tolist() == [1.0, 0.0, 0.5]


def test_held_out_measures_by_hand() -> None:
    # Sorted by target: rows 1, 3 | 0, 2; row 1 with row 0, row 3 with row 2.
    assert disjoint_pairs([5.0, 6.0, 7.0, 8.0], [3.0, 1.0, 4.0, 2.0]) == ([5.0, 7.0], [6.0, 8.0])
    assert pair_accuracy(*disjoint_pairs([1.0, 2.0], [0.0, 1.0])) == 1.0
    assert disjoint_pairs([1.0, 2.0], [1.0, 1.0]) == ([], [])
    assert ranks([3.0, 1.0, 3.0]) == [1.5, 0.0, 1.5]
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 7.0]) == pytest.approx(0.993399, abs=1e-6)
    assert correlation([1.0, 1.0], [0.0, 5.0]) == 0.0


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "regression", "margin": 1.0},
        {"objective": "process", "center_rewards": 0.5},
        {"score_loss": "bce"},
        {"steps": {"separator": "\n"}},
        {"objective": "regression", "label_smoothing": 0.1},
        {"label_smothing": 0.1},
        {"objective": "process", "steps": {"seperator": "\n"}},
    ],
)
def test_settings_that_do_nothing_are_refused(refused: Refused, fields: dict[str, Any]) -> None:
    refused(reward_config, **fields)


@pytest.mark.parametrize(
    ("kind", "rows", "fields"),
    [
        (Kind.INSTRUCTIONS, scored, {}),
        (Kind.UNPAIRED, labeled, {"objective": "process"}),
        (Kind.INSTRUCTIONS, scored, {"objective": "regression", "score_loss": "bce"}),
    ],
)
def test_data_that_does_not_fit_is_refused(
    refused: Refused, kind: Kind, rows: Any, fields: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    data = artifact(tmp_path / "data", kind, rows(8), rows(4, start=8))
    refused(lambda: run(reward_stage(tmp_path, tiny_model, data, **fields)))


def test_margins_need_scores_and_scores_need_to_differ(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    bare = [{**row, "chosen": row["completion"], "rejected": [{"role": "assistant", "content": "?"}], "score": None}
            for row in scored(12)]  # fmt: skip
    data = artifact(tmp_path / "a", Kind.PREFERENCES, bare[:8], bare[8:])
    refused(lambda: run(reward_stage(tmp_path / "a", tiny_model, data, margin=1.0)))
    refused(lambda: run(reward_stage(tmp_path / "a", tiny_model, data, objective="regression")))
    equal = [{**row, "score": 2.0} for row in scored(12)]
    data = artifact(tmp_path / "b", Kind.INSTRUCTIONS, equal[:8], equal[8:])
    refused(lambda: run(reward_stage(tmp_path / "b", tiny_model, data, objective="regression")))


def test_steps_that_hold_the_separator_are_left_out_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    rows = stepwise(24)
    rows[0]["steps"][0]["content"] = "0 ok\nand more"
    data = artifact(tmp_path / "data", Kind.UNPAIRED, rows, stepwise(6, start=24))
    stage = reward_stage(tmp_path, tiny_model, data, objective="process", max_steps=1, steps={"separator": SEPARATOR})
    assert run(stage)["answers"] == 23
    events = [json.loads(line) for line in stage.events.read_text(encoding="utf-8").splitlines()]
    assert any("1 of 24 train rows skipped: its numbers of steps and labels differ" in str(event) for event in events)
