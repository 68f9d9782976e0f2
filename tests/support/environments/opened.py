"""Environments of tests, opened."""

from __future__ import annotations

from typing import Any

from align.config.environment import EnvironmentConfig
from align.config.validation import validate
from align.environments.environment import EnvironmentSource
from align.environments.sources import open_environment

CLASSES, TOOLS = "tests.support.environments.classes", "tests.support.environments.tools"


def open_class(name: str, **fields: Any) -> EnvironmentSource:
    return open_block({"class": f"{CLASSES}:{name}"} | fields)


def open_tools(*names: str, score: str = "by_response", **fields: Any) -> EnvironmentSource:
    tools = [f"{TOOLS}:{name}" for name in names]
    return open_block({"tools": tools, "score": f"{TOOLS}:{score}"} | fields)


def open_block(block: dict[str, Any]) -> EnvironmentSource:
    config = validate(EnvironmentConfig, {"max_tokens": 64} | block, "p.yaml: stages.ppo.environment")
    return open_environment(config)
