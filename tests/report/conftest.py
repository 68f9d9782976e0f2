"""A run as the report sees it: artifacts with records, events, a scorecard and samples, one of them hostile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from align.artifacts import Artifact, Kind
from align.evaluation.pairs import pair_accuracy
from align.evaluation.scorecard import Measurements, Resampling, build

HOSTILE = (
    '<script>document.title="PWNED"</script><img src=x onerror="document.title=\'PWNED\'">'
    "</script><!-- </div> {{ 7*7 }} $\\frac{1}{2}$ \x1b[31m \u202egnp.exe \x00 \ud800"
)
POLICIES = ["model", "sft", "ppo"]
PROMPTS = 24


def write_artifact(
    root: Path, stage: str, kind: Kind, inputs: tuple[str, ...] = (), curves: dict[str, list[float]] | None = None
) -> Artifact:
    """A finished stage's folder with a record and events."""
    folder = root / stage
    folder.mkdir()
    record = {
        "key": stage.encode().hex() * 4,
        "kind": stage,
        "stage": stage,
        "makes": str(kind),
        "version": 1,
        "config": {"learning_rate": 0.0005, "note": HOSTILE},
        "seed": 17,
        "input_stages": [{"stage": name, "kind": name, "key": name.encode().hex() * 4} for name in inputs],
        "metrics": {"loss_last": 0.25, "nested": {"deep": 3}},
        "tokens": 12_345,
        "seconds": 83.0,
        "peak_memory_bytes": 3 * 2**30,
        "created": "2026-01-02T03:04:05+00:00",
        "packages": {"torch": "2.13.0"},
        "command": "align run pipelines/quickstart.yaml",
    }
    events = [{"event": "warning", "message": f"careful with {HOSTILE}"}]
    for name, values in (curves or {}).items():
        events += [{"event": "metrics", "step": step, name: value} for step, value in enumerate(values)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return Artifact(stage, kind, folder, record)


def example_scorecard() -> dict:
    """Three checkpoints on 24 prompts of two sources; sft helps, ppo does not clearly."""
    generator = np.random.default_rng(0)
    values = {}
    for index, policy in enumerate(POLICIES):
        gold = np.clip(generator.uniform(0, 0.3, PROMPTS) + 0.4 * min(index, 1), 0, 1)
        values[policy] = {
            "gold": [[float(value)] for value in gold],
            "reward": [[float(value * 2 + index)] for value in gold],
            "length": [[float(value)] for value in generator.integers(5, 40, PROMPTS)],
            "finished": [[1.0]] * PROMPTS,
            "kl": [[float(value)] for value in generator.gamma(2, index + 0.1, PROMPTS)],
        }
    found = Measurements(POLICIES, "sft", "model", ["<b>lists</b>", "words"] * (PROMPTS // 2), values)
    pair = {"chosen": [{"content": "aa"}], "rejected": [{"content": "b"}], "source": "words"}
    accuracy = pair_accuracy([pair] * 10, [1.0] * 8 + [0.0] * 2, [0.5] * 10) | {"stage": "reward"}
    settings = {
        "prompts": PROMPTS,
        "samples_per_prompt": 1,
        "sampling": {"max_tokens": 48, "temperature": 1.0},
        "engines": ["transformers"],
        "seed": 17,
    }
    return build(found, Resampling(300, 0), accuracy, settings)


@pytest.fixture
def run(tmp_path: Path) -> tuple[list[Artifact], dict]:
    """Artifacts of a small finished run, and its scorecard."""
    line = [1 / (step + 1) for step in range(30)]
    artifacts = [
        write_artifact(tmp_path, "model", Kind.MODEL),
        write_artifact(tmp_path, "data", Kind.INSTRUCTIONS),
        write_artifact(tmp_path, "sft", Kind.POLICY, ("model", "data"), {"loss": line, "test_loss": line[:3]}),
        write_artifact(tmp_path, "ppo", Kind.POLICY, ("sft", "data"), {f"m{i}": line for i in range(8)}),
        write_artifact(tmp_path, "evaluate", Kind.SCORECARD, ("model", "sft", "ppo", "data")),
    ]
    card = example_scorecard()
    folder = artifacts[-1].path
    (folder / "scorecard.json").write_text(json.dumps(card), encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for index in range(PROMPTS):
            hostile = index == 0
            responses = {
                policy: [
                    {
                        "text": HOSTILE if hostile and policy == "ppo" else f"answer {index} of {policy}",
                        "tokens": 9,
                        "finished": index % 5 > 0,
                        "gold": 1.0 if hostile and policy == "ppo" else index / 100,
                    }
                ]
                for policy in POLICIES
            }
            prompt = [{"role": "user", "content": HOSTILE if hostile else f"question {index}"}]
            line_ = {"id": str(index), "source": "<b>lists</b>", "prompt": prompt, "responses": responses}
            file.write(json.dumps(line_) + "\n")
    return artifacts, card


@pytest.fixture
def make_artifact(tmp_path: Path) -> Callable[..., Artifact]:
    """Writes one more artifact."""

    def make(stage: str, kind: Kind, **options: object) -> Artifact:
        return write_artifact(tmp_path, stage, kind, **options)  # type: ignore[arg-type]

    return make
