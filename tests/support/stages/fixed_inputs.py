"""Stages that hand over a policy from a folder and a few prompts. Torch-free, so their processes are quick."""

from __future__ import annotations

from typing import Any

from align.config.base import Config
from align.pipeline.context import StageContext
from align.registry import Stage
from align.store.artifacts import Kind


class FolderPolicyConfig(Config):
    """Where the policy lies."""

    folder: str


class NumberedPromptsConfig(Config):
    """How many prompts there are."""

    count: int


def policy(context: StageContext) -> dict[str, Any]:
    """Point at the folder."""
    (context.output / "model").symlink_to(context.config.folder)
    return {}


def prompts(context: StageContext) -> dict[str, Any]:
    """Write the prompts, the first half of them as the test split too."""
    from align.data.rows import user, write_rows

    rows = [{"id": str(i), "source": "test", "prompt": [user(f"say {'x' * i}")], "checks": "{\"answer\": \"72\"}"}
            for i in range(context.config.count)]  # fmt: skip
    write_rows(context.output / "train.parquet", rows)
    write_rows(context.output / "test.parquet", rows[: len(rows) // 2])
    return {}


def _stage(name: str, kind: Kind, config: str) -> Stage:
    return Stage(name, 1, kind, f"{__name__}:{config}", f"{__name__}:{name}", name, f"{__name__}:{name.upper()}")


POLICY = _stage("policy", Kind.POLICY, "FolderPolicyConfig")
PROMPTS = _stage("prompts", Kind.PROMPTS, "NumberedPromptsConfig")
