"""Fixtures of the command line's tests: a store with a trained checkpoint, and the export command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from align.cli.main import main
from tests.support import toy
from tests.support.cli.example_store import LICENSES, ExampleStore, make_store
from tests.support.models.adapters import write_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """``model/`` and ``adapter/`` of a training stage; the adapter's config names the folder of the base."""
    return write_trained(tiny_model, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    """Return the file of a pipeline of toy stages."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy.pipeline(), sort_keys=False))
    return path


@pytest.fixture
def example(tmp_path: Path, tiny_model: Path, trained: Path, tiny_reward: Path) -> ExampleStore:
    return make_store(tmp_path, tiny_model, trained, tiny_reward, LICENSES)


@pytest.fixture
def export(example: ExampleStore, tmp_path: Path) -> Callable[..., int]:
    """The command without the check, into ``out``."""

    def run(word: str, *more: str, check: bool = False, output: Path = tmp_path / "out") -> int:
        rest = [*more, *(() if check else ("--no-check",)), "--store", str(example.store.root)]
        return main(["export", word, "--output", str(output), *rest])

    return run
