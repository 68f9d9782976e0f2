"""Stage contexts on a tiny model and a few rows, for the tests of the stages that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.config.base import Config
from align.config.runtime import Runtime
from align.data.rows import assistant, user, write_rows
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind

WORDS = ["red", "green", "blue", "amber", "violet", "silver", "copper", "ivory"]


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows that serve every stage: the right answer repeats the prompt's word, the wrong one is another word."""
    new_rows = []
    for number in range(start, start + count):
        word, reply_word = WORDS[number % len(WORDS)], WORDS[(number + 3) % len(WORDS)]
        new_rows.append(
            {
                "id": str(number),
                "source": "test",
                "checks": "",
                "prompt": [user(f"Say {word}" + "!" * (number % 5) + "+" * (number // 8))],  # no prompt twice
                "completion": [assistant(word)],
                "chosen": [assistant(word)],
                "rejected": [assistant(f"{reply_word} {reply_word}")],
                "chosen_score": 0.0 if number % 4 == 0 else 1.0,  # every fourth pair is mislabeled
                "rejected_score": 1.0 if number % 4 == 0 else 0.0,
            }
        )
    return new_rows


def data_artifact(folder: Path, kind: Kind, train: int = 40, test: int = 12) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.parquet", rows(train))
    write_rows(folder / "test.parquet", rows(test, start=train))
    return Artifact("data", kind, folder, {})


def context(root: Path, config: Config, model: Path, data: Artifact, field: str = "model") -> StageContext:
    """A context below ``root``; calling it twice resumes from the first one's checkpoints."""
    output, checkpoints = root / "output", root / "checkpoints"
    for folder in (output, checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    holder = root / "source"
    if not holder.exists():
        holder.mkdir()
        (holder / "model").symlink_to(model)
    inputs = {field: Artifact("model", Kind.MODEL, holder, {"key": "model"}), "data": data}
    places = (output, checkpoints, root / "events.jsonl")
    kinds = {stage.config_class(): kind for kind, stage in STAGES.items()}
    # A stage of a test's own has a module of its name.
    kind = kinds.get(type(config), type(config).__module__.rpartition(".")[2])
    return StageContext("stage", config, inputs, 17, Runtime(device="cpu"), *places, kind=kind)


def events(context: StageContext, kind: str) -> list[dict[str, Any]]:
    lines = context.events.read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(context: StageContext) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(context, "metrics") if "loss" in event}


def warnings(stage: StageContext) -> list[str]:
    return [event["message"] for event in events(stage, "warning")]
