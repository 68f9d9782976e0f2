"""Contexts of stages that learn from rollouts, for tests that kill them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.config.runtime import Runtime
from align.data.rows import assistant, user, write_rows
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind

COMMON: dict[str, Any] = {
    "policy": "policy", "prompts": "prompts", "score": "tests.support.stages.vowels:share", "learning_rate": 1e-3,
    "rollout_batch": 8, "samples_per_prompt": 4, "updates": 5, "save_updates": 2, "num_epochs": 2,
    "num_mini_batches": 1, "max_tokens": 6,
    "max_prompt_tokens": 64, "precision": "float32", "scheduler": "linear", "tuning": {"method": "lora", "rank": 4},
}  # fmt: skip


KINDS: dict[str, dict[str, Any]] = {
    "ppo": {"normalize_scores": True, "kl_controller": "adaptive", "kl_target": 0.1, "kl_horizon": 50},
    "grpo": {"zero_variance": "resample"},
    "rloo": {"whiten_advantages": True},
    "online_dpo": {"micro_batch_size": 2},
    "rejection": {"best": 2, "truncated": "learn"},
}


def make_stage(kind: str, root: Path, model: Path, **fields: Any) -> StageContext:
    """A context of ``kind``; the second with the same ``root`` goes on with the first one's checkpoints."""
    config = STAGES[kind].config_class()(**{**COMMON, **KINDS[kind], **fields})
    data = root / "data"
    for name in ("output", "checkpoints", "data", "policy"):
        (root / name).mkdir(parents=True, exist_ok=True)
    if not (root / "policy" / "model").exists():
        (root / "policy" / "model").symlink_to(model)
    rows = [
        {"id": str(n), "source": "t", "checks": "", "prompt": [user(f"say {'x' * n}")], "completion": [assistant("oa")]}
        for n in range(8)
    ]
    write_rows(data / "train.parquet", rows)
    write_rows(data / "test.parquet", rows[:3])
    inputs: dict[str, Any] = {
        "policy": Artifact("policy", Kind.POLICY, root / "policy", {}),
        "prompts": Artifact("prompts", Kind.PROMPTS, data, {}),
        "ptx": Artifact("rows", Kind.INSTRUCTIONS, data, {}) if "ptx" in fields else None,
        "reward": None,
    }
    runtime = Runtime.model_validate({"device": "cpu", "engine": {"name": "transformers"}, "threads": 1})
    return StageContext(kind, config, inputs, 5, runtime, root / "output", root / "checkpoints", root / "events.jsonl")
