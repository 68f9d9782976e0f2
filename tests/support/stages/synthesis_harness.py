"""What the tests of stage synthesize share: a server that answers from the request, and stages laid out."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from align.config.runtime import EngineConfig, Runtime
from align.data.rows import user, write_rows
from align.extensions.synthesis.config import SynthesizeConfig
from align.pipeline.context import StageContext
from align.runner.stage_result import write_work
from align.store.artifacts import Artifact, Kind
from align.store.fingerprint import digest
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.records import put_record


def talk(body: dict[str, Any]) -> Any:
    """Answers that follow from the request: of one to nine words, and a judge who prefers more of them."""
    content = body["messages"][-1]["content"]
    if content.startswith("Reply with the one word"):
        return completion("ready")
    if "### Answer A" in content:
        first, _, rest = content.partition("### Answer A\n")[2].partition("\n\n### Answer B\n")
        lengths = [len(first.split()), len(rest.partition("\n\n###")[0].split())]
        mark = "C" if lengths[0] == lengths[1] else "A" if lengths[0] > lengths[1] else "B"
        return completion(f"Words count. [[{mark}]]")
    rng = random.Random(f"{body['seed']}/{content}")
    if "numbered list" in content:
        words = [f"w{rng.randrange(500)}" for _ in range(40)]
        return completion("\n".join(f"{9 + n}. Tell me {' '.join(words[n * 5 : n * 5 + 5])}" for n in range(8)))
    return completion(" ".join(f"w{rng.randrange(9)}" for _ in range(rng.randint(1, 9))))


def word_score(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    """A scorer by import path: words."""
    return [float(len(response.split())) for response in responses]


def make_rows(count: int, name: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}{i}", "source": "t", "prompt": [user(f"Say {name} {i}")], "checks": ""} for i in range(count)
    ]


def make_artifact(folder: Path, name: str, kind: Kind, model: Path | None = None) -> Artifact:
    (folder / name).mkdir(parents=True, exist_ok=True)
    if model is not None and not (folder / name / "model").exists():
        (folder / name / "model").symlink_to(model)
    return Artifact(name, kind, folder / name, {"key": digest(f"key of {name}")})


def make_context(
    folder: Path, weights: Path | None = None, scorer: Path | None = None, train: int = 6, test: int = 3, **config: Any
) -> StageContext:
    inputs: dict[str, Any] = dict.fromkeys(("model", "prompts", "reward", "judge_model"))
    if config.get("prompts"):
        inputs["prompts"] = make_artifact(folder, "prompts", Kind.PROMPTS)
        write_rows(folder / "prompts" / "train.parquet", make_rows(train, "a"))
        write_rows(folder / "prompts" / "test.parquet", make_rows(test, "b"))
    for name, kind, folder_of in (
        ("model", Kind.POLICY, weights), ("judge_model", Kind.POLICY, weights), ("reward", Kind.REWARD, scorer)
    ):  # fmt: skip
        if config.get(name):
            inputs[name] = make_artifact(folder, name, kind, folder_of)
    for name in ("output", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return StageContext(
        name="synthesize",
        config=SynthesizeConfig(**config),
        inputs=inputs,
        seed=11,
        runtime=Runtime(engine=EngineConfig(name="transformers")),
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        events=folder / "events.jsonl",
    )


def endpoint_of(fake: FakeChat, **settings: Any) -> dict[str, Any]:
    return {
        "url": fake.url,
        "model": "good-model",
        "name": "fake",
        "retries": 2,
        "patience": 0,
        "timeout": 5,
    } | settings


def read_ledger(context: StageContext) -> dict[str, Any]:
    ledger: dict[str, Any] = json.loads((context.output / "ledger.json").read_text())
    return ledger


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def write_seeds(folder: Path) -> str:
    path = folder / "seeds.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"Seed number {n} of all"}) + "\n" for n in range(20)))
    return str(path)


def lay_out(context: StageContext, engine: str = "auto") -> Path:
    """A folder as the runner lays it out for a stage's process."""
    folder = context.output.parent
    inputs: dict[str, Any] = {}
    for name, artifact in context.inputs.items():
        inputs[name] = artifact and {"stage": artifact.stage, "path": str(artifact.path)}
        if artifact is not None:
            put_record(artifact.path, makes=str(artifact.kind), key=artifact.record["key"])
    work = {
        "name": "s", "stage": "synthesize", "config": context.config.model_dump(mode="json"), "seed": 11,
        "runtime": Runtime(engine=EngineConfig(name=engine)).model_dump(mode="json"), "inputs": inputs,
    }  # fmt: skip
    write_work(folder, work)
    return folder
