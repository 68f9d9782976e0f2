"""A stage's process puts garbage collections off until its libraries are imported, and then collects as usual."""

from __future__ import annotations

import gc
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.models.pretrained import open_model
from align.pipeline.garbage_collection import IMPORT_THRESHOLDS, THRESHOLDS, relax_collections, resume_collections


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(
    "module", ["align.runner.worker", "align.export.verify_worker", "align.evaluation.lm_eval.worker"]
)
def test_processes_start_with_rare_collections(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module, str(tmp_path / "nowhere")])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises((SystemExit, OSError, ValueError)):
        runpy.run_module(module, run_name="__main__")
    assert gc.get_threshold() == IMPORT_THRESHOLDS


def test_the_first_model_ends_the_rare_collections_and_freezes_the_imports(tiny_model: Path) -> None:
    import torch

    relax_collections()
    frozen = gc.get_freeze_count()
    model, _ = open_model("causal", tiny_model, torch.float32)
    assert gc.get_threshold() == THRESHOLDS
    assert gc.get_freeze_count() > frozen
    # a frozen model would never be freed once it is garbage
    assert any(candidate is model for candidate in gc.get_objects())


def test_nothing_is_frozen_in_a_process_that_collects_as_usual() -> None:
    gc.set_threshold(*THRESHOLDS)  # a process of pytest-xdist has relaxed them, until a test resumes them
    frozen = gc.get_freeze_count()
    resume_collections()
    assert gc.get_freeze_count() == frozen
    assert gc.get_threshold() == THRESHOLDS
