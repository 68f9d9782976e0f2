"""Shipped pipelines, and the packages beyond those of development that some of them need."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PACKAGES = {"gym": "reasoning_gym"}
"""Package that a pipeline needs, by the pipeline's name."""
UNPINNED = {"g4_countdown"}
"""Pipelines with data at no commit: loading them asks the Hub for it."""


def is_runnable(path: Path) -> bool:
    """Return whether a pipeline loads here: offline, with the package that it needs."""
    if path.stem in UNPINNED:
        return False
    return path.stem not in PACKAGES or importlib.util.find_spec(PACKAGES[path.stem]) is not None


def parameter(path: Path) -> Any:
    """Return a test's parameter, which is skipped if the package is missing or the Hub would be asked."""
    reason = f"{PACKAGES.get(path.stem)} is not installed"
    if path.stem in UNPINNED:
        reason = "loading it asks the Hub for a commit"
    return pytest.param(path, marks=[] if is_runnable(path) else pytest.mark.skip(reason=reason))
