"""Replay: which rows a step sees, the term's arithmetic, that it keeps what would be forgotten, exact resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.config.stages.reward import RewardConfig
from align.config.stages.sft import SftConfig
from align.config.validation import validate
from align.errors import UserError
from align.models.loading import load_policy
from align.pipeline.registry import STAGES
from align.training.forgetting import Replay, replayed_rows
from align.training.rows import Encoded
from tests.support.models.scaled_logits import make_scaling_model
from tests.support.training.harness import events, losses
from tests.support.training.killed_stage import Killed, dying
from tests.support.training.training_stages import FULL, make_replay_stage, make_stage


def test_every_row_has_its_turn_before_one_comes_again() -> None:
    series = replayed_rows(5, 0, 15, seed=1)
    assert all(sorted(series[index : index + 5]) == [0, 1, 2, 3, 4] for index in (0, 5, 10))
    assert series[:5] != series[5:10]
    assert replayed_rows(5, 3, 8, seed=1) == series[3:8]
    assert replayed_rows(5, 0, 5, seed=2) != series[:5]
    assert replayed_rows(5, 4, 4, seed=1) == []


def test_a_step_replays_its_fraction_and_carries_the_rest() -> None:
    rows = Encoded(rows=[{"input_ids": [1, 2], "labels": [-100, 2]}] * 50)
    replay = Replay(None, rows, rows, rows_per_step=8 * 0.2 / 0.8 + 0.5, weight=1.0, seed=0)
    assert [len(replay.rows_of(step)) for step in range(4)] == [2, 3, 2, 3]


@pytest.mark.parametrize("scales", [False, True])
def test_the_term_is_the_steps_mean_whatever_the_micro_batches(tiny_model: Path, tmp_path: Path, scales: bool) -> None:
    model = load_policy(make_scaling_model(tmp_path) if scales else tiny_model)
    rows = [{"input_ids": list(range(40, 44 + n)), "labels": [-100, -100, *range(42, 44 + n)]} for n in range(6)]
    encoded = Encoded(rows=rows, lengths=[len(row["input_ids"]) for row in rows])
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(autocast=torch.no_grad),
        state=SimpleNamespace(global_step=0),
        add_metric=lambda name, value: None,
    )
    replay = Replay(trainer, encoded, encoded, rows_per_step=3, weight=0.5, seed=4)
    inputs = {"input_ids": torch.zeros(1, 1)}
    total, tokens = 0.0, 0
    for row in replay.rows_of(0):
        ids = torch.tensor([rows[row]["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, 1:-1].gather(1, ids[0, 2:, None])
        total, tokens = total - float(logprobs.sum()), tokens + len(logprobs)

    def part(number: int) -> float:
        trainer.part = (number, 2)
        return float(replay.loss(trainer, model, inputs))

    parts = [part(0), part(1)]
    assert sum(parts) == pytest.approx(0.5 * total / tokens, rel=1e-4)
    assert part(0) == parts[0], "a repeated step has the same rows"
    trainer.state.global_step = 1
    assert part(0) != parts[0]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_replay_loss_is_a_mean_over_answer_tokens(micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Encoded(rows=[{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}] * 9)
    logged: list[tuple[str, float]] = []
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=0),
        part=(0, micro_batches),
        add_metric=lambda name, value: logged.append((name, value)),
    )
    replay = Replay(trainer, encoded, encoded, rows_per_step=3, weight=0.5, seed=4)
    monkeypatch.setattr(replay, "_summed", lambda rows: torch.tensor(3.0 * len(rows)))
    loss = float(replay.loss(trainer, None, {}))
    # 3 rows of 2 answer tokens, 3 nats a row: 1.5 nats a token, of which this micro-batch has its share of the rows.
    assert logged == [("replay_loss", 1.5)]
    assert loss == pytest.approx(0.5 * 1.5 / micro_batches)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kto", "orpo", "cpo"])
def test_every_loss_of_trl_takes_it(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    made_by = make_replay_stage(kind, tmp_path, tiny_model, replay_fraction=0.3, max_steps=2, ema=0.5)
    metrics = STAGES[kind].runner()(made_by)
    assert metrics["replayed_rows"] == int(2 * 8 * 0.3 / 0.7)
    assert metrics["test_replay_loss_after"] != metrics["test_replay_loss_before"]
    assert [event["step"] for event in events(made_by, "metrics") if "replay_loss" in event] == [1, 2]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_what_is_replayed_is_kept(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    fields = {"learning_rate": 5e-3, "max_steps": 20, "epochs": 9}
    only_scored = make_replay_stage(kind, tmp_path / "scored", tiny_model, replay_fraction=0, **fields)
    replayed = make_replay_stage(kind, tmp_path / "kept", tiny_model, replay_fraction=0.3, replay_weight=1.0, **fields)
    without, with_it = STAGES[kind].runner()(only_scored), STAGES[kind].runner()(replayed)
    assert without["test_replay_loss_before"] == with_it["test_replay_loss_before"]
    assert with_it["test_replay_loss_after"] < without["test_replay_loss_after"] - 0.5
    assert (without["replayed_rows"], with_it["replayed_rows"]) == (0, int(20 * 8 * 0.3 / 0.7))
    if kind == "sft":
        plain = make_stage("sft", tmp_path / "plain", tiny_model, FULL, **fields)
        STAGES["sft"].runner()(plain)
        assert losses(plain) == losses(only_scored)


def test_resumed_run_equals_the_uninterrupted_one(tiny_model: Path, tmp_path: Path) -> None:
    run = STAGES["sft"].runner()
    fields = {"replay_fraction": 0.2, "max_steps": 9, "save_steps": 4}
    uninterrupted, parts = (make_replay_stage("sft", tmp_path / f, tiny_model, **fields) for f in ("a", "b"))
    run(uninterrupted)
    with pytest.raises(Killed):
        run(dying(parts, 6))
    assert run(parts)["resumed_from_step"] == 4
    assert losses(parts) == losses(uninterrupted)
    expected, actual = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert all(expected[name].equal(actual[name]) for name in expected)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (SftConfig, {"replay_fraction": 0.2}, "needs a `replay:` stage to replay from"),
        (SftConfig, {"replay": "g", "replay_fraction": 0, "replay_weight": 1}, "has no effect at"),
        (SftConfig, {"replay": "g", "replay_frac": 0.2}, "unknown key 'replay_frac'. Did you mean 'replay_fraction'"),
        (SftConfig, {"replays": "g"}, "unknown key 'replays'. Did you mean 'replay'"),
        (RewardConfig, {"replay": "g"}, "which a reward model cannot; mix pairs in the data"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(config, {"model": "m", "data": "d", "learning_rate": 1e-3, **fields}, "p.yaml: stages.x")
