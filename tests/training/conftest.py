"""Runs in several processes, made once a module."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from align.runner.runner import run_pipeline
from tests.support.training.distributed_runs import Made, pipeline


@pytest.fixture(scope="module")
def train_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Runs a stage, once for the same question."""
    known: dict[tuple[str, int, str], Made] = {}

    def run(name: str, processes: int, strategy: str = "ddp") -> Made:
        if (name, processes, strategy) not in known:
            store = tmp_path_factory.mktemp(f"{name}-{processes}-{strategy}")
            launch = {"processes": processes, "strategy": strategy}
            finished = run_pipeline(pipeline(name, launch), store=store, only=None)
            known[name, processes, strategy] = Made(name, finished.artifacts[name].path, finished.metrics(name))
            shutil.rmtree(store)
        return known[name, processes, strategy]

    return run
