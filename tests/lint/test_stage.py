"""Training stages look at their rows before the first step: errors stop them, waivers let them pass, all is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.config.stages.lint import LintSettings
from align.config.validation import validate
from align.data.rows import assistant, user, write_rows
from align.errors import UserError
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind
from tests.support.refusals import Refused
from tests.support.training.harness import context, events, rows


def made(kind: str, root: Path, model: Path, train: list[dict[str, Any]], **fields: Any) -> StageContext:
    """A stage on ``train``, and on test rows without fault; calling it again goes on in the same folders."""
    source = {"dpo": "policy", "ppo": "policy"}.get(kind, "model")
    folder = root / "data"
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.parquet", train)
    write_rows(folder / "test.parquet", rows(8, start=80))
    config = STAGES[kind].config_class()(
        **{source: "model"},
        data="data",
        learning_rate=1e-3,
        max_steps=1,
        warmup_ratio=0.0,
        batch_size=8,
        max_length=128,
        **fields,
    )
    return context(root, config, model, Artifact("data", Kind.PREFERENCES, folder, {}), source)


def kept(stage: StageContext) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((stage.output / "findings.json").read_text(encoding="utf-8"))
    return document


def with_control_token() -> list[dict[str, Any]]:
    train = rows(16)
    train[4]["prompt"] = [user("Say <|im_end|> now \x1b[2J")]
    return train


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_an_error_stops_the_stage_before_its_first_step(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    stage = made(kind, tmp_path, tiny_model, with_control_token())
    with pytest.raises(UserError) as caught:
        STAGES[kind].runner()(stage)
    text = str(caught.value)
    assert text.startswith("stage: the rows would teach something wrong; nothing was trained.")
    assert "error special-token-in-content, 1 of 24 rows" in text
    assert "train row 5 (4): prompt: user writes '<|im_end|>': Say <|im_end|> now" in text
    assert "\x1b" not in text
    assert "`lint: {waive: [special-token-in-content]}`" in text
    assert [finding["name"] for finding in kept(stage)["findings"]] == ["special-token-in-content"]
    # Not even the reference of DPO was scored.
    assert not stage.events.exists() or not events(stage, "progress")
    assert not list(stage.checkpoints.iterdir())


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_waived_error_is_trained_on_and_warned_of(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    stage = made(kind, tmp_path, tiny_model, with_control_token(), lint={"waive": ["special-token-in-content"]})
    assert STAGES[kind].runner()(stage)["steps"] == 1
    assert kept(stage)["looked_at"] == {"train": {"rows": 16, "of": 16}, "test": {"rows": 8, "of": 8}}
    assert kept(stage)["findings"][0]["waived"]
    (warning,) = events(stage, "warning")
    assert warning["message"].startswith("stage: error (waived) special-token-in-content, 1 of 24 rows:")


def test_warnings_are_logged_and_counted_faults_only_once(tiny_model: Path, tmp_path: Path) -> None:
    train = rows(16)
    train[3]["prompt"] = [user("Dear {{name}}, say violet")]
    train[5]["completion"] = [assistant("y" * 200)]  # cut at 128 tokens
    stage = made("sft", tmp_path, tiny_model, train)
    STAGES["sft"].runner()(stage)
    messages = [event["message"] for event in events(stage, "warning")]
    assert len(messages) == 2
    assert messages[0].startswith("stage: 1 of 16 train rows cut at max_length")
    assert messages[1].startswith("stage: warning placeholder, 1 of 24 rows")
    actual = {finding["name"]: finding for finding in kept(stage)["findings"]}
    assert actual.keys() == {"placeholder", "answer-truncated"}
    assert actual["answer-truncated"]["examples"][0]["place"] == {"split": "train", "row": 6, "id": "5", "where": ""}


def test_a_waived_warning_is_kept_and_not_shown(tiny_model: Path, tmp_path: Path) -> None:
    train = rows(16)
    train[3]["prompt"] = [user("Dear {{name}}, say violet")]
    stage = made("sft", tmp_path, tiny_model, train, lint={"waive": ["placeholder"]})
    STAGES["sft"].runner()(stage)
    assert not events(stage, "warning")
    assert [finding["name"] for finding in kept(stage)["findings"]] == ["placeholder"]


def test_rows_that_were_left_out_are_named(tiny_model: Path, tmp_path: Path) -> None:
    train = rows(16)
    train[2]["rejected"] = train[2]["chosen"]
    train[7]["rejected"] = [assistant("z" * 200)]
    stage = made("dpo", tmp_path, tiny_model, train)
    STAGES["dpo"].runner()(stage)
    actual = {finding["name"]: finding for finding in kept(stage)["findings"]}
    assert {name: finding["examples"][0]["place"]["row"] for name, finding in actual.items()} == {
        "chosen-equals-rejected": 3,
        "over-max-length": 8,
    }


def test_a_sample_is_drawn_by_the_seed_and_said(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="align")
    rows_of = []
    for name in ("one", "two"):
        train = rows(40)
        for row in train:
            row["prompt"] = [user(f"{row['prompt'][0]['content']} {{{{name}}}}")]
        stage = made("sft", tmp_path / name, tiny_model, train, lint={"rows": 4})
        STAGES["sft"].runner()(stage)
        assert kept(stage)["looked_at"]["train"] == {"rows": 4, "of": 40}
        rows_of.append([example["place"]["row"] for example in kept(stage)["findings"][0]["examples"]])
    assert rows_of[0] == rows_of[1]
    assert rows_of[0] != [1, 2, 3, 4]
    assert "lint: train 4 of 40 rows, drawn by the seed, test 4 of 8 rows, drawn by the seed" in caplog.text


def test_prompts_of_ppo(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    """Before the engine is opened, which on a GPU takes minutes."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "train.parquet", with_control_token())
    config = STAGES["ppo"].config_class()(
        policy="model",
        prompts="data",
        score="gold",
        score_validation={"rows": 0},
        learning_rate=1e-3,
        updates=1,
        rollout_batch=4,
        max_tokens=4,
    )
    stage = context(tmp_path, config, tiny_model, Artifact("data", Kind.PROMPTS, folder, {}), "policy")
    stage.inputs.update(prompts=stage.inputs.pop("data"), reward=None, ptx=None)
    refused(lambda: STAGES["ppo"].runner()(stage))


def test_a_misspelled_waiver_is_named_with_its_place(refused: Refused) -> None:
    refused(validate, LintSettings, {"waive": ["double_boss"]}, "p.yaml: stages.x")


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "ppo"])
def test_linting_changes_no_key(kind: str) -> None:
    fields: dict[str, Any] = {"reward": {}, "ppo": {"score": "gold"}}.get(kind, {})
    source = {"dpo": "policy", "ppo": "policy"}.get(kind, "model")
    data = "prompts" if kind == "ppo" else "data"
    keys = set()
    for settings in ({}, {"rows": 5}, {"waive": ["double-bos"]}):
        stages = {
            "base": {"stage": "model", "source": "tiny"},
            "pairs": {"stage": "tests.support.lint.pairs_stage:PAIRS"},
            "last": {"stage": kind, source: "base", data: "pairs", "learning_rate": 1e-3, "lint": settings, **fields},
        }
        keys.add(Pipeline({"name": "p", "stages": stages}, "p.yaml").nodes["last"].key)
    assert len(keys) == 1
