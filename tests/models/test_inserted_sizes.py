"""Sizes of prompts, prefixes and adapters counted from a config are those of the tensors that are trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.tuning import AdaptersTuning, PrefixTuning, PromptTuning, PTuning, TuningBase
from align.models.architecture import read_architecture
from tests.support.models.tuning.confident import confident_copy, tuned

TUNINGS = [
    PromptTuning(tokens=3),
    PTuning(tokens=3),
    PTuning(tokens=3, encoder="lstm", hidden_size=24),
    PrefixTuning(tokens=3),
    AdaptersTuning(size=16),
    AdaptersTuning(size=16, position="sequential", after=["attention", "mlp"]),
    AdaptersTuning(kind="llama_adapter", tokens=3),
    AdaptersTuning(kind="llama_adapter", tokens=3, layers=2),
]


@pytest.mark.parametrize("tuning", TUNINGS, ids=[f"{one.label} {at}" for at, one in enumerate(TUNINGS)])
def test_counted_as_they_are(tuning: TuningBase, tiny_model: Path, tmp_path: Path) -> None:
    model, _ = tuned(confident_copy(tiny_model, tmp_path / "base"), tuning)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert read_architecture(tiny_model / "config.json").adapters(tuning, "model") == trained
