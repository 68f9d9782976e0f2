"""Judged tasks in a whole evaluation: two-layer models answer, a stand-in for a server and a reward model judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.runtime import EngineConfig, Runtime
from align.config.stages.evaluate import EvaluateConfig
from align.models.built_in import make_tiny
from align.pipeline.context import StageContext
from align.stages import evaluate
from align.store.artifacts import Artifact, Kind
from tests.support.evaluation.judged_harness import endpoint, parts, write_lines
from tests.support.inference.fake_chat import FakeChat, completion

QUESTIONS = [
    {"question_id": number, "category": category, "turns": [f"Say {number}", "And again"], "reference": ["a", "b"]}
    for number, category in enumerate(["math", "writing", "math", "stem"])
]


@pytest.fixture
def fake() -> Any:
    def judge(body: dict[str, Any]) -> Any:
        content = body["messages"][-1]["content"]
        answer = parts(content)[-1][1]
        return completion(f"[[{1 + len(answer) % 10}]]" if "[[N]]" in content else "[[C]]")

    server = FakeChat(judge)
    yield server
    server.stop()


@pytest.fixture
def context(tmp_path: Path, tiny_model: Path, tiny_reward: Path, fake: FakeChat) -> StageContext:
    def artifact(stage: str, kind: Kind, model: Path) -> Artifact:
        return Artifact(stage, kind, model.parent, {"key": f"{stage}-key"})

    policies = [
        artifact("model", Kind.MODEL, tiny_model),
        artifact("sft", Kind.POLICY, make_tiny(tmp_path / "sft" / "model", seed=1)),
    ]
    files = [write_lines(tmp_path / "question.jsonl", QUESTIONS)]
    config = EvaluateConfig(
        policies=["model", "sft"], reference="sft", reward="reward", max_context=256, precision="float32",
        bootstrap=200, baselines={"best2": {"of": "sft", "best_of": 2}},
        tasks={
            "mt": {"task": "judged", "preset": "mt_bench", "files": files, "max_tokens": 8, "judge": endpoint(fake)},
            "duel": {"task": "judged", "files": files, "max_tokens": 8, "judge": {"reward": True}, "against": "all"},
        },
    )  # fmt: skip
    for name in ("out", "checkpoints"):
        (tmp_path / name).mkdir()
    return StageContext(
        name="evaluate", config=config, seed=3, output=tmp_path / "out", checkpoints=tmp_path / "checkpoints",
        inputs={"policies": policies, "reference": policies[1], "reward": artifact("reward", Kind.REWARD, tiny_reward)},
        events=tmp_path / "events.jsonl",
        runtime=Runtime(device="cpu", engine=EngineConfig(name="transformers")),
    )  # fmt: skip


def test_grades_and_win_rates_of_real_answers(context: StageContext, fake: FakeChat) -> None:
    evaluate.run(context)
    card = json.loads((context.output / "scorecard.json").read_text(encoding="utf-8"))
    samples = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    graded = [line for line in samples if line["task"] == "mt"]
    judgments = [json.loads(line) for line in (context.output / "judgments.jsonl").read_text().splitlines()]
    # Two turns of four questions by three systems; a reward model judges the other task, without texts.
    assert len(judgments) == 24 and {line["task"] for line in judgments} == {"mt"}
    for system in ("model", "sft", "best2"):
        # The stand-in's grade is a function of the answer, so each can be checked on what was sampled.
        grades = [
            [1 + len(turn["text"].strip() or "(nothing)") % 10 for turn in line["responses"][system][0]["turns"]]
            for line in graded
        ]
        estimate = card["estimates"][system]["mt.score"]
        assert estimate["n"] == 4
        assert estimate["value"] == pytest.approx(sum(sum(grade) / 2 for grade in grades) / 4)
        assert card["estimates"][system]["mt.turn2"]["value"] == pytest.approx(sum(grade[1] for grade in grades) / 4)
    assert len(fake.bodies) <= 3 * 4 * 2  # the same answer to the same question is judged once
    assert set(card["task_families"]["mt"]) == {"math", "writing", "stem"}
    assert card["tasks"]["mt"]["settings"]["usage"]["requests"] == len(fake.bodies)
    assert card["tasks"]["mt"]["settings"]["sampling"]["temperature"] == {"math": 0.0, "stem": 0.1, "writing": 0.7}
    rows = {(row["one"], row["other"]): row for row in card["win_rates"]}
    assert set(rows) == {("model", "sft"), ("best2", "sft"), ("best2", "model")}
    assert all(row["task"] == "duel" and row["n"] == 4 for row in rows.values())
    assert "duel.win_rate" not in card["estimates"]["sft"]
    for entry in ("model", "best2"):
        assert card["estimates"][entry]["duel.win_rate"]["value"] == rows[entry, "sft"]["win_rate"]["value"]
    count = len(fake.bodies)
    text = (context.output / "scorecard.json").read_text(encoding="utf-8")
    evaluate.run(context)
    assert len(fake.bodies) == count
    assert (context.output / "scorecard.json").read_text(encoding="utf-8") == text
