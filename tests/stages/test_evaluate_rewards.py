"""The evaluate stage's reward models and gates, end to end on two-layer models."""

import json
from pathlib import Path

import pytest

from align.config.runtime import EngineConfig, Runtime
from align.config.stages.evaluate import EvaluateConfig
from align.data.rows import user, write_rows
from align.inference.transformers import TransformersEngine
from align.models.built_in import make_tiny, make_tiny_reward
from align.pipeline.context import StageContext
from align.stages import evaluate
from align.store.artifacts import Artifact, Kind

RECORDS = [
    *({"id": f"m{at}", "prompt": f"q{at}", "chosen": ["yes" * at], "rejected": ["a", "b" * at, "c"], "subset": "Math"}
      for at in range(1, 9)),
    {"id": "tied:1", "prompt": "a color", "chosen": ["red", "blue"], "rejected": ["stone"], "subset": "Ties"},
    {"id": "ref:1", "prompt": "the sky", "chosen": ["blue"], "rejected": ["red"], "subset": "Ties"},
]  # fmt: skip
"""Shaped like RewardBench 2."""


@pytest.fixture
def context(tmp_path: Path, tiny_model: Path, tiny_reward: Path):
    """Makes a stage's context of the gates."""

    def artifact(stage: str, kind: Kind, model: Path | None = None) -> Artifact:
        folder = model.parent if model else tmp_path / stage
        folder.mkdir(exist_ok=True)
        return Artifact(stage, kind, folder, {"key": f"{stage}-key"})

    data = artifact("data", Kind.PROMPTS)
    rows = [{"id": f"{index}", "source": "words", "checks": "", "prompt": [user("x" * index)]} for index in range(1, 5)]
    write_rows(data.split("test"), rows)
    policies = [
        artifact("sft", Kind.POLICY, tiny_model),
        artifact("ppo", Kind.POLICY, make_tiny(tmp_path / "ppo" / "model", seed=1)),
    ]
    file = tmp_path / "best.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    model_dir = make_tiny_reward(tmp_path / "other" / "model", seed=1)

    def make(**gates) -> StageContext:
        config = EvaluateConfig(
            policies=["sft", "ppo"], reference="sft", prompts="data", reward="reward", second_reward="other",
            tasks={"bench": {"task": "reward_pairs", "files": [str(file)]}}, gates=gates, max_tokens=4,
            precision="float32", bootstrap=200,
        )  # fmt: skip
        for name in ("out", "checkpoints"):
            (tmp_path / name).mkdir()
        return StageContext(
            name="evaluate",
            config=config,
            inputs={
                "policies": policies,
                "reference": policies[0],
                "prompts": data,
                "reward": artifact("reward", Kind.REWARD, tiny_reward),
                "second_reward": artifact("other", Kind.REWARD, model_dir),
            },
            seed=3,
            runtime=Runtime(device="cpu", engine=EngineConfig(name="transformers")),
            output=tmp_path / "out",
            checkpoints=tmp_path / "checkpoints",
            events=tmp_path / "events.jsonl",
        )

    return make


def test_reward_models_and_gates_reach_the_scorecard(context):
    inputs = context(reward=[">= sft + 1000", ">= sft - 1000"], kl_to_sft={"bound": "<= 0.001", "level": "warning"})
    result = evaluate.run(inputs)
    card = json.loads((inputs.output / "scorecard.json").read_text(encoding="utf-8"))
    first, second = card["reward_models"]
    assert [(entry["stage"], entry["task"], entry["pairs"]) for entry in (first, second)] == [
        ("reward", "bench", 10),
        ("other", "bench", 10),
    ]
    assert set(first["sections"]) == {"Math", "Ties"}
    items, samples = (_of_bench(inputs.output / name) for name in ("items.jsonl", "samples.jsonl"))
    assert len(items) == len(samples) == 10
    for report in (first, second):
        values = [item["values"][report["stage"]] for item in items]
        assert sum(entry["correct"][0] for entry in values) / 10 == report["as_labeled"]["value"]
        assert sum(entry["margin"][0] for entry in values) / 10 == pytest.approx(report["margin"]["value"])
        for entry, sample in zip(values, samples, strict=True):
            for side in ("chosen", "rejected"):
                shown = [answer["scores"][report["stage"]] for answer in sample["responses"][side]]
                assert shown == entry[side]
    assert [len(sample["responses"]["rejected"]) for sample in samples] == [3] * 8 + [1] * 2
    assert samples[0]["responses"]["rejected"][1]["text"] == "b"
    assert {item["source"] for item in items} == {"Math", "Ties"}
    assert (first["agreement"]["other"], second["agreement"]["other"]) == ("other", "reward")
    assert first["margin"] != second["margin"]
    assert card["tasks"]["bench"]["n"] == 10
    assert [(row["system"], row["expression"], row["passed"]) for row in card["gates"]] == [
        ("ppo", ">= sft + 1000", False),
        ("ppo", ">= sft - 1000", True),
        ("ppo", "<= 0.001", False),
    ]
    assert card["gates"][0]["clear"] is True
    assert card["gates"][2]["low"] <= card["gates"][2]["value"] <= card["gates"][2]["high"]
    assert result["failed_gates"] == [card["gates"][0]["text"]]
    assert "reward of ppo is " in result["failed_gates"][0]
    assert ", below sft + 1000 = " in result["failed_gates"][0]


def _of_bench(path: Path) -> list:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["task"] == "bench"]


def test_gate_without_its_metric_stops_before_sampling(refused, context, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("it was sampled")

    monkeypatch.setattr(TransformersEngine, "__init__", never)
    refused(lambda: evaluate.run(context(**{"bench.accuracy": ">= 0.5"})))
