"""Contexts of stages that sample and learn: tiny models, and eight prompts with an answer and tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.config.runtime import Runtime
from align.data.rows import user, write_rows
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind

BASE: dict[str, Any] = {"policy": "sft", "prompts": "data", "learning_rate": 1e-3, "score_validation": {"rows": 0}}
SMALL: dict[str, Any] = {
    "rollout_batch": 16,
    "samples_per_prompt": 4,
    "num_mini_batches": 1,
    "updates": 2,
    "max_tokens": 6,
    "max_prompt_tokens": 64,
    "precision": "float32",
}


def context_maker(folder: Path, policy: Path, reward: Path) -> Callable[..., StageContext]:
    """Return a function that makes the context of an attempt at a stage: ``make(kind, attempt, **fields)``."""
    for name, model in (("sft", policy), ("reward", reward)):
        (folder / name).mkdir()
        (folder / name / "model").symlink_to(model)
    (folder / "data").mkdir()
    checks = json.dumps({"answer": "72"})
    columns = {"source": "test", "checks": checks, "tests": json.dumps(["assert f(1) == 2"])}
    rows = [{"id": str(i), "prompt": [user(f"say {'x' * i}")], **columns} for i in range(8)]
    write_rows(folder / "data" / "train.parquet", rows)
    write_rows(folder / "data" / "test.parquet", rows[:4])

    def make(kind: str, attempt: str, **fields: Any) -> StageContext:
        options = BASE | SMALL
        if kind == "rejection":
            options["truncated"] = "learn"
        config = STAGES[kind].config_class()(**(options | fields))
        kinds = {"policy": ("sft", Kind.POLICY), "reward": ("reward", Kind.REWARD), "prompts": ("data", Kind.PROMPTS)}
        inputs = {
            field: Artifact(stage, artifact_kind, folder / stage, {"key": stage}) if getattr(config, field) else None
            for field, (stage, artifact_kind) in kinds.items()
        } | {"ptx": None}
        outputs = folder / attempt
        for name in ("out", "checkpoints"):
            (outputs / name).mkdir(parents=True, exist_ok=True)
        runtime = Runtime(engine={"name": "transformers"}, threads=1)
        places = (outputs / "out", outputs / "checkpoints", outputs / "events.jsonl")
        return StageContext(kind, config, inputs, 5, runtime, *places)

    return make
