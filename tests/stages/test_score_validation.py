"""Stages that learn from a score refuse a broken score before they load a model, and accept correct scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from align.errors import UserError
from align.pipeline.registry import STAGES
from align.stages import rl, sample
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.stages.broken_rewards import ANSWERS, MODULE, make_stage_without_models

KINDS = ("ppo", "grpo", "rloo", "online_dpo", "rejection", "sample")


class ModelLoaded(Exception):
    """A stage has asked for its tokenizer, its model or its engine."""


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise ModelLoaded

    for module, name in ((rl, "load_tokenizer"), (rl, "load_for_tuning"), (rl, "open_engine"), (rl, "RewardModel")):
        monkeypatch.setattr(module, name, load)
    monkeypatch.setattr(sample, "load_tokenizer", load)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", load)


def start(kind: str, folder: Path, score: Any, **fields: Any) -> list[str]:
    """Run the stage until it loads a model, and return its notes."""
    context = make_stage_without_models(kind, folder, score, **fields)
    with pytest.raises(ModelLoaded):
        STAGES[kind].runner()(context)
    return notes(folder)


def notes(folder: Path) -> list[str]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [json.loads(line)["message"] for line in lines if json.loads(line)["event"] == "note"]


def refuse(kind: str, folder: Path, score: Any, **fields: Any) -> str:
    """Run the stage, which must refuse its score before it loads a model, and return the message."""
    with pytest.raises(UserError) as refusal:
        STAGES[kind].runner()(make_stage_without_models(kind, folder, score, **fields))
    assert not list((folder / "checkpoints").glob("checkpoint-*"))
    return str(refusal.value)


BROKEN: dict[str, tuple[Any, str]] = {
    "wrong column": ([{"number": "year"}], "does not give references its maximum"),
    "truncated references": ([{"number": "cut"}], "does not give references its maximum"),
    "shuffled rows": (
        [{"function": f"{MODULE}:right", "arguments": {"column": "shuffled"}}],
        "does not give references its maximum",
    ),
    "constant score": (f"{MODULE}:constant", "gives all answers to a row the same score"),
    "thousands separators": (f"{MODULE}:without_separators", "for most answers with a thousands separator"),
    "ignores the answer": (f"{MODULE}:by_prompt", "gives all answers to a row the same score"),
    "fails at an empty answer": (f"{MODULE}:fails_at_nothing", "the score fails at an empty answer"),
    "random": (f"{MODULE}:drawn", "gives the same answer another score the second time"),
    "copied prompt": (f"{MODULE}:copied", "a copy of the prompt 1"),
    "inverted sign": ([{"number": "answer", "weight": -1.0}], "does not give references its maximum"),
    "empty answers are best": (f"{MODULE}:brief", "reads neither the row's answer nor its prompt"),
    "style on rows with answers": (f"{MODULE}:vowels", "score_validation: {waive: [row]}"),
}


@pytest.mark.parametrize(("score", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_reward_is_refused_before_a_model(tmp_path: Path, score: Any, message: str) -> None:
    assert message in refuse("grpo", tmp_path, score)


@pytest.fixture
def judge() -> Iterator[Callable[[Callable[[str], str]], dict[str, Any]]]:
    """A function that starts a judge with a rule, and returns its entry."""
    servers = []

    def serve(grade: Callable[[str], str]) -> dict[str, Any]:
        servers.append(FakeChat(lambda body: completion(grade(body["messages"][-1]["content"]))))
        return {"judge": {"endpoint": {"url": servers[-1].url, "model": "judge-1"}}}

    yield serve
    for server in servers:
        server.stop()


def test_judge_that_always_answers_5_is_refused(tmp_path: Path, judge: Any) -> None:
    message = refuse("grpo", tmp_path, [judge(lambda text: "[[5]]")])
    assert "'judge' gives all answers to a row the same score" in message and "0.444444" in message


def test_judge_that_reads_answers_is_accepted(tmp_path: Path, judge: Any) -> None:
    entry = judge(lambda text: "[[8]]" if "####" in text else "[[2]]")
    listed = start("grpo", tmp_path, [entry, {"function": f"{MODULE}:brief", "weight": 0.1}])
    assert any("score of 'judge' on 8 rows" in line for line in listed)
    assert any("score of 'sum' on 8 rows: reference best" in line for line in listed)


def test_judge_is_not_asked_without_judge_rows(tmp_path: Path, judge: Any) -> None:
    entry = judge(lambda text: "[[5]]")
    listed = start("grpo", tmp_path, [entry], score_validation={"judge_rows": 0})
    assert any("because it is a judge, and judge_rows is 0" in line for line in listed)


CORRECT: dict[str, Any] = {
    "verifier": [{"number": "answer"}],
    "function": f"{MODULE}:right",
    "function and brevity": [{"function": f"{MODULE}:right"}, {"function": f"{MODULE}:brief", "weight": 0.2}],
    "forms": [{"regex": "#### [0-9,]+$"}, {"number": "answer", "weight": 0.5}],
    "logged reward": [{"number": "answer"}, {"function": f"{MODULE}:constant", "weight": 0.0}],
    "penalty": [{"number": "answer"}, {"regex": "forbidden", "weight": -1.0}],
}


@pytest.mark.parametrize("score", CORRECT.values(), ids=CORRECT)
def test_correct_reward_is_accepted(tmp_path: Path, score: Any) -> None:
    assert start("grpo", tmp_path, score)


def test_style_is_accepted_if_the_row_is_waived(tmp_path: Path) -> None:
    assert start("grpo", tmp_path, f"{MODULE}:vowels", score_validation={"waive": ["row"]})


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_that_learns_from_a_score_refuses(tmp_path: Path, kind: str) -> None:
    message = refuse(kind, tmp_path, f"{MODULE}:constant")
    assert message.startswith(f"{kind}: the score cannot teach the task")
    assert "score_validation: {waive: [reference, " in message


@pytest.mark.parametrize("kind", KINDS)
def test_table_is_shown_before_the_start(tmp_path: Path, kind: str) -> None:
    (line,) = start(kind, tmp_path, [{"number": "answer"}])
    count = len(ANSWERS)
    assert f"{kind}: score of 'number' on {count} rows: reference best {count}/{count}, empty lower {count}" in line


def test_floor_of_0_refuses_nothing(tmp_path: Path) -> None:
    (line,) = start("grpo", tmp_path, f"{MODULE}:constant", score_validation={"floor": 0.0})
    assert "reference best 0/22" in line


def test_no_rows_validate_nothing(tmp_path: Path) -> None:
    assert start("grpo", tmp_path, f"{MODULE}:constant", score_validation={"rows": 0}) == []


def test_named_reference_takes_the_place_of_the_completion(tmp_path: Path) -> None:
    score = [{"exact": "answer"}]
    assert "#### 7' scores 0 (unequal)" in refuse("grpo", tmp_path / "completion", score)
    assert start("grpo", tmp_path / "answer", score, score_validation={"reference": "answer"})


def test_missing_reference_column_is_refused(tmp_path: Path) -> None:
    message = refuse("grpo", tmp_path, [{"number": "answer"}], score_validation={"reference": "anser"})
    assert "score_validation.reference: row r0 has no 'anser'" in message


def test_validation_is_part_of_no_key() -> None:
    config_class = STAGES["grpo"].config_class()
    settings = {"policy": "p", "prompts": "d", "score": "gold", "learning_rate": 1e-3}
    changed = config_class(**settings, score_validation={"floor": 0.2})
    assert "score_validation" in changed.fields_outside_key()
    assert not any("validation" in name for name in changed.identities(Path()))
