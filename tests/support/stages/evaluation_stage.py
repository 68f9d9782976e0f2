"""The inputs and the context of an evaluate stage on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.runtime import EngineConfig, Runtime
from align.config.stages.evaluate import EvaluateConfig
from align.data.rows import assistant, user, write_rows
from align.models.built_in import make_tiny
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact, Kind

PROMPTS = 6


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path, tiny_reward: Path) -> dict:
    """Artifacts for every input: base and reference share their weights, the third checkpoint has others."""
    model_dir = make_tiny(tmp_path / "ppo" / "model", seed=1)

    def artifact(stage: str, kind: Kind, model: Path | None = None) -> Artifact:
        folder = model.parent if model else tmp_path / stage
        folder.mkdir(exist_ok=True)
        return Artifact(stage, kind, folder, {"key": f"{stage}-key"})

    data, pairs = artifact("data", Kind.INSTRUCTIONS), artifact("sample", Kind.PREFERENCES)
    base = {"source": "words", "checks": ""}
    rows = [
        base | {"id": str(i), "prompt": [user("say " + "x" * i)], "completion": [assistant(f"ok {i}")]}
        for i in range(PROMPTS)
    ]
    rows.append(base | {"id": "long", "prompt": [user("x" * 300)], "completion": [assistant("no")]})
    write_rows(data.split("test"), rows)
    sides = {"chosen": [assistant("aaa")], "rejected": [assistant("b")], "chosen_score": 1.0, "rejected_score": 0.0}
    write_rows(pairs.split("test"), [base | {"id": str(i), "prompt": [user(f"q{i}")]} | sides for i in range(4)])
    policies = [
        artifact("model", Kind.MODEL, tiny_model),
        artifact("sft", Kind.POLICY, tiny_model),
        artifact("ppo", Kind.POLICY, model_dir),
    ]
    return {
        "policies": policies,
        "reference": policies[1],
        "prompts": data,
        "heldout": data,
        "reward": artifact("reward", Kind.REWARD, tiny_reward),
        "pairs": pairs,
    }


@pytest.fixture
def context(tmp_path: Path, inputs: dict, monkeypatch: pytest.MonkeyPatch) -> StageContext:
    scorer = tmp_path / "scorer_of_this_test.py"
    scorer.write_text("def variety(rows, responses): return [min(1.0, len(set(r)) / 9) for r in responses]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = EvaluateConfig(
        policies=["model", "sft", "ppo"],
        reference="sft",
        prompts="data",
        heldout="data",
        reward="reward",
        pairs="sample",
        score="scorer_of_this_test:variety",
        samples_per_prompt=2,
        max_tokens=8,
        max_prompt_tokens=100,
        max_heldout_length=100,
        precision="float32",
        bootstrap=200,
    )
    for name in ("out", "checkpoints"):
        (tmp_path / name).mkdir()
    return StageContext(
        name="evaluate",
        config=config,
        inputs=inputs,
        seed=3,
        runtime=Runtime(device="cpu", engine=EngineConfig(name="transformers")),
        output=tmp_path / "out",
        checkpoints=tmp_path / "checkpoints",
        events=tmp_path / "events.jsonl",
    )
