"""A store laid out by hand: base model, data, SFT with adapters, reward model, scorecard, as a run leaves them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.card import write_card
from align.store.artifacts import Artifact, Kind
from align.store.store import Store
from tests.support.data.by_hand import row, write_build

RECIPE = {"kind": "instructions", "sources": [{"type": "hub", "dataset": "org/set", "revision": "a" * 40}]}


@dataclass
class Given:
    """The store and its artifacts."""

    store: Store
    model: Artifact
    data: Artifact
    sft: Artifact
    reward: Artifact


def publish(
    store: Store, kind: str, makes: Kind, digit: str, folder: Path, inputs: dict[str, Artifact], **record: Any
) -> Artifact:
    """An artifact whose key is one hexadecimal digit over and over, with the files of ``folder``."""
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
                {"stage": one.stage, "kind": one.record["kind"], "key": one.record["key"]} for one in inputs.values()
            ],
            **record,
        },
    )  # fmt: skip


def lay_out(root: Path, base: Path, trained: Path, reward: Path, licenses: dict[str, str | None]) -> Given:
    """``trained`` has ``model/`` and ``adapter/``; the others are model folders. ``licenses`` are the data's."""
    store = Store.open(root / "store")
    made = root / "made"

    def folder(name: str, **parts: Path) -> Path:
        (made / name).mkdir(parents=True)
        for part, source in parts.items():
            shutil.copytree(source, made / name / part)
        return made / name

    (folder("model", model=base) / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    config = {"source": "org/base", "revision": "b" * 40}
    model = publish(store, "model", Kind.MODEL, "0", made / "model", {}, config=config)
    rows = write_build(made / "data", [row("a", "b"), row("c", "d")], [row("e", "f")], licenses=licenses)
    write_card(rows, RECIPE, json.loads((rows / "ledger.json").read_text()), "set")
    data = publish(store, "data", Kind.INSTRUCTIONS, "1", rows, {})
    folders = folder("sft", model=trained / "model", adapter=trained / "adapter")
    sft = publish(store, "sft", Kind.POLICY, "2", folders, {"model": model, "data": data}, metrics={"steps": 25})
    scored = publish(store, "reward", Kind.REWARD, "3", folder("reward", model=reward), {"model": sft, "data": data})
    stages = {one.stage: {"kind": one.record["kind"], "key": one.record["key"]} for one in (model, data, sft, scored)}
    raw = {"name": "quick", "runtime": {"threads": 2}, "stages": {"sft": {"model": "model", "learning_rate": 1e-3}}}
    store.remember_run("quick", stages, raw)
    return Given(store, model, data, sft, scored)


def add_scorecard(given: Given, card: dict[str, Any], digit: str = "4") -> Artifact:
    """An evaluation with that scorecard."""
    folder = given.store.root.parent / f"card-{digit}"
    folder.mkdir()
    (folder / "scorecard.json").write_text(json.dumps(card))
    return publish(given.store, "evaluate", Kind.SCORECARD, digit, folder, {"policies": given.sft})
