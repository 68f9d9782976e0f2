"""A store as a run leaves it: base model, data, SFT with adapters, reward model, scorecard."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.card import write_card
from align.store.artifacts import Artifact, Kind
from align.store.store import Store
from tests.support.data.sample_build import row, write_build

RECIPE = {"kind": "instructions", "sources": [{"type": "hub", "dataset": "org/set", "revision": "a" * 40}]}

LICENSES: dict[str, str | None] = {"first": "Apache-2.0"}


@dataclass
class ExampleStore:
    """A store and its artifacts."""

    store: Store
    model: Artifact
    data: Artifact
    sft: Artifact
    reward: Artifact


def publish(
    store: Store, kind: str, makes: Kind, digit: str, folder: Path, inputs: dict[str, Artifact], **record: Any
) -> Artifact:
    """Publish an artifact with the files of ``folder``; its key repeats one hexadecimal ``digit``."""
    (store.root / kind).mkdir(exist_ok=True)
    return store.publish(
        folder,
        {
            "key": digit * 64, "kind": kind, "stage": kind, "pipeline": "quick", "makes": str(makes), "version": 1,
            "config": {}, "parts": {}, "seed": 17, "metrics": {},
            "seconds": 61.0, "peak_memory_bytes": 2**30, "tokens": 1234,
            "created": f"2026-01-0{len(store.all()) + 1}T00:00:00+00:00", "align": "0.1.0",
            "packages": {"python": "3.11.7", "torch": "2.13.0"}, "platform": "linux x86_64, 2 cores", "git": "c" * 40,
            "command": "align run pipelines/quick.yaml",
            "inputs": {field: artifact.record["key"] for field, artifact in inputs.items()},
            "input_stages": [
                {"stage": source.stage, "kind": source.record["kind"], "key": source.record["key"]}
                for source in inputs.values()
            ],
            **record,
        },
    )  # fmt: skip


def make_store(root: Path, base: Path, trained: Path, reward: Path, licenses: dict[str, str | None]) -> ExampleStore:
    """Make the store. ``trained`` has ``model/`` and ``adapter/``; the others are model folders.

    ``licenses`` maps the data's sources to their licenses.
    """
    store = Store.open(root / "store")
    parts_folder = root / "parts"

    def folder(name: str, **parts: Path) -> Path:
        (parts_folder / name).mkdir(parents=True)
        for part, source in parts.items():
            shutil.copytree(source, parts_folder / name / part)
        return parts_folder / name

    (folder("model", model=base) / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    config = {"source": "org/base", "revision": "b" * 40}
    model = publish(store, "model", Kind.MODEL, "0", parts_folder / "model", {}, config=config)
    rows = write_build(parts_folder / "data", [row("a", "b"), row("c", "d")], [row("e", "f")], licenses=licenses)
    write_card(rows, RECIPE, json.loads((rows / "ledger.json").read_text()), "set")
    data = publish(store, "data", Kind.INSTRUCTIONS, "1", rows, {})
    folders = folder("sft", model=trained / "model", adapter=trained / "adapter")
    sft = publish(store, "sft", Kind.POLICY, "2", folders, {"model": model, "data": data}, metrics={"steps": 25})
    reward_artifact = publish(
        store, "reward", Kind.REWARD, "3", folder("reward", model=reward), {"model": sft, "data": data}
    )
    stages = {
        artifact.stage: {"kind": artifact.record["kind"], "key": artifact.record["key"]}
        for artifact in (model, data, sft, reward_artifact)
    }
    raw = {"name": "quick", "runtime": {"threads": 2}, "stages": {"sft": {"model": "model", "learning_rate": 1e-3}}}
    store.remember_run("quick", stages, raw)
    return ExampleStore(store, model, data, sft, reward_artifact)


def add_scorecard(example: ExampleStore, card: dict[str, Any], digit: str = "4") -> Artifact:
    """Publish an evaluation of the SFT checkpoint with that scorecard."""
    folder = example.store.root.parent / f"card-{digit}"
    folder.mkdir()
    (folder / "scorecard.json").write_text(json.dumps(card))
    return publish(example.store, "evaluate", Kind.SCORECARD, digit, folder, {"policies": example.sft})
