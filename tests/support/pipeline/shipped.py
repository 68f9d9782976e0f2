"""Shipped pipelines, and the packages beyond those of development that some of them need."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PACKAGES = {"gym": "reasoning_gym"}
"""Package that a pipeline needs, by the pipeline's name."""


def is_runnable(path: Path) -> bool:
    """Return whether the package that a pipeline needs is installed."""
    return path.stem not in PACKAGES or importlib.util.find_spec(PACKAGES[path.stem]) is not None


def parameter(path: Path) -> Any:
    """Return a test's parameter, which is skipped where the package is missing."""
    reason = f"{PACKAGES.get(path.stem)} is not installed"
    return pytest.param(path, marks=[] if is_runnable(path) else pytest.mark.skip(reason=reason))
