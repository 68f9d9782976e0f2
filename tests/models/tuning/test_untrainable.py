"""Types of model that stages refuse to train, by name and before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.config.tuning import FullTuning, LoraTuning, QloraTuning
from align.models.tuning.apply import load_for_tuning, refuse_untrainable
from tests.support.refusals import Refused


def folder(path: Path, kind: str) -> Path:
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    return path


@pytest.mark.parametrize("tuning", [FullTuning(), LoraTuning(), QloraTuning()])
def test_recurrent_gemma_is_refused(refused: Refused, tmp_path: Path, tuning: LoraTuning) -> None:
    refused(lambda: load_for_tuning(folder(tmp_path, "recurrent_gemma"), tuning))


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "rwkv"])
def test_models_with_only_a_state_are_refused_by_name(refused: Refused, tmp_path: Path, kind: str) -> None:
    source = folder(tmp_path, kind)
    refused(lambda: load_for_tuning(source, QloraTuning()))
    refused(lambda: refuse_untrainable(source, LoraTuning(), samples=True))
    refuse_untrainable(source, LoraTuning())


def test_other_types_are_trained(tmp_path: Path) -> None:
    refuse_untrainable(folder(tmp_path, "mamba2"), QloraTuning(), samples=True)
