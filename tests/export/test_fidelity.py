"""Limits of the distance between a checkpoint and its export."""

from __future__ import annotations

from dataclasses import replace

import pytest

from align.errors import StageFailed
from align.export.fidelity import Fidelity, Reading, require_close

WEIGHTS = Reading("transformers 5", kl=0.0016, largest_kl=0.1, same=0.983, perplexity=16.8)
ENGINE = Reading("llama.cpp", kl=0.0062, largest_kl=0.3, same=0.939, perplexity=17.0)
MEASURED = Fidelity("q8_0", 138, 513, 8, 164, 16.9, 600, [WEIGHTS, ENGINE])


def test_measured_readings_of_q8_0_are_within_the_limits() -> None:
    require_close(MEASURED)


@pytest.mark.parametrize(
    ("readings", "engine"),
    [
        ([replace(WEIGHTS, kl=0.011), ENGINE], "transformers 5"),
        ([replace(WEIGHTS, same=0.939), ENGINE], "transformers 5"),  # enough for llama.cpp, not for the weights
        ([WEIGHTS, replace(ENGINE, kl=0.051)], "llama.cpp"),
        ([WEIGHTS, replace(ENGINE, kl=None, same=0.84)], "llama.cpp"),
    ],
)
def test_reading_beyond_its_limit_fails_the_export(readings: list[Reading], engine: str) -> None:
    with pytest.raises(StageFailed, match=f"diverges from the checkpoint in {engine}"):
        require_close(replace(MEASURED, readings=readings))
