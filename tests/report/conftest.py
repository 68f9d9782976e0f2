"""Fixtures of the report's tests: a small run and a full one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align.store.artifacts import Artifact, Kind
from tests.support.report.browser import chromium
from tests.support.report.example_card import POLICIES, small_card
from tests.support.report.example_run import make_full_run, prompt_samples, write_artifact, write_evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Artifact], dict]:
    """Artifacts of a small finished run, and its scorecard; tests only read them."""
    root = tmp_path_factory.mktemp("run")
    line = [1 / (step + 1) for step in range(30)]
    artifacts = [
        write_artifact(root, "model", Kind.MODEL),
        write_artifact(root, "data", Kind.INSTRUCTIONS),
        write_artifact(root, "sft", Kind.POLICY, ("model", "data"), {"loss": line, "test_loss": line[:3]}),
        write_artifact(root, "ppo", Kind.POLICY, ("sft", "data"), {f"m{i}": line for i in range(8)}),
        write_artifact(root, "evaluate", Kind.SCORECARD, ("model", "sft", "ppo", "data")),
    ]
    card = small_card()
    write_evaluation(artifacts[-1], card, prompt_samples(POLICIES, heat=False))
    return artifacts, card


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Artifact], dict]:
    """A run with everything; tests only read it."""
    return make_full_run(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """A browser, for the tests of one module."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def make_artifact(tmp_path: Path) -> Callable[..., Artifact]:
    """Writes one more artifact."""

    def make(stage: str, kind: Kind, **options: object) -> Artifact:
        return write_artifact(tmp_path, stage, kind, **options)  # type: ignore[arg-type]

    return make
