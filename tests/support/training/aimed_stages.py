"""Short stages of every kind, for tests that kill them at chosen moments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from align.config.runtime import Runtime
from align.data.rows import write_rows
from align.models.built_in import make_tiny
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind
from tests.support.training.harness import context, data_artifact

ROWS = 32


COMMON: dict[str, Any] = {
    "learning_rate": 3e-3, "batch_size": 8, "micro_batch_size": 4, "max_length": 128, "precision": "float32",
    "save_steps": 3, "scheduler": "linear",
}  # fmt: skip


MID_EPOCH = {"epochs": 3, "max_steps": 7}
"""Of four steps an epoch: the last step is in the middle of one."""


KINDS: dict[str, dict[str, Any]] = {
    "sft": {},
    "pretrain": {"batch_size": 2, "micro_batch_size": 1, "max_length": 64},
    "reward": {},
    "dpo": {},
    "kto": {"batch_size": 16},
    "cpo": {},
    "orpo": {},
    "simpo": {},
    "distill": {"on_policy": 0.5, "max_tokens": 6, "tuning": {"method": "lora", "rank": 4}},
}


def texts(folder: Path) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 60), ("test", 6)):
        lines = [{"id": str(n), "source": "t", "text": "kilo lima mike " * (n % 5 + 1)} for n in range(count)]
        write_rows(folder / f"{split}.parquet", lines)
    return Artifact("data", Kind.TEXTS, folder, {})


def make_stage(kind: str, root: Path, model: Path, **fields: Any) -> StageContext:
    """A context of ``kind``; the second with the same ``root`` goes on with the first one's checkpoints."""
    source = "model" if kind in ("sft", "pretrain", "reward", "distill") else "policy"
    teacher = {"teacher": "teacher"} if kind == "distill" else {}
    config = STAGES[kind].config_class()(
        **{source: "model"}, data="data", **teacher, **{**COMMON, **KINDS[kind], **fields}
    )
    data = texts(root / "data") if kind == "pretrain" else data_artifact(root / "data", Kind.PREFERENCES, train=ROWS)
    plain = context(root, config, model, data, source)
    inputs = dict(plain.inputs)
    if config.replay is not None:
        inputs["replay"] = data_artifact(root / "general", Kind.INSTRUCTIONS, train=12)
    if kind == "distill":
        make_tiny(root / "teacher" / "model", seed=5) if not (root / "teacher").exists() else None
        inputs["teacher"] = Artifact("teacher", Kind.MODEL, root / "teacher", {"key": "t"})
    engine = Runtime.model_validate({"device": "cpu", "engine": {"name": "transformers"}, "threads": 1})
    return replace(plain, name=kind, inputs=inputs, runtime=engine)
