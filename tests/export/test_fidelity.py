"""Limits of the distance between a checkpoint and its export."""

from __future__ import annotations

from dataclasses import replace

import pytest

from align.evaluation.statistics import Difference, Estimate
from align.export.fidelity import Fidelity, Reading, cost_lines, cost_summary, require_close
from tests.support.refusals import Refused

WEIGHTS = Reading("transformers 5", kl=0.0016, largest_kl=0.1, same=0.983, perplexity=16.8)
ENGINE = Reading("llama.cpp", kl=0.0062, largest_kl=0.3, same=0.939, perplexity=17.0)
MEASURED = Fidelity("q8_0", 138, 513, 8, 164, 16.9, 600, [WEIGHTS, ENGINE])


def test_measured_readings_of_q8_0_are_within_the_limits() -> None:
    require_close(MEASURED)


@pytest.mark.parametrize(
    "readings",
    [
        [replace(WEIGHTS, kl=0.011), ENGINE],
        [replace(WEIGHTS, same=0.939), ENGINE],  # enough for llama.cpp, not for the weights
        [WEIGHTS, replace(ENGINE, kl=0.051)],
        [WEIGHTS, replace(ENGINE, kl=None, same=0.84)],
    ],
)
def test_reading_beyond_its_limit_fails_the_export(refused: Refused, readings: list[Reading]) -> None:
    refused(lambda: require_close(replace(MEASURED, readings=readings)))


def test_card_shows_task_scores_with_intervals() -> None:
    before = Reading("transformers 5", None, None, 1.0, 16.9, 20.0, Estimate(0.3, 0.22, 0.4, 100, "wilson"))
    change = Difference(-0.02, -0.06, 0.01, 100, 0.6, "mcnemar")
    after = replace(WEIGHTS, solved=Estimate(0.28, 0.2, 0.37, 100, "wilson"), change=change)
    fidelity = replace(MEASURED, readings=[after], checkpoint=[before], items=100)
    rows = [line.replace("\\", "") for line in cost_lines(fidelity) if line.startswith("| ")]
    assert rows[-2] == "| checkpoint, transformers 5 | – | – | 100.0 % | 16.900 | 0.300 (0.220 to 0.400) |  | 20 |"
    expected = "| 98.3 % | 16.800 | 0.280 (0.200 to 0.370) | −0.020 (−0.060 to +0.010) |  |"
    assert rows[-1] == f"| this, transformers 5 | 0.0016 | 0.1 {expected}"
    assert cost_summary(fidelity).endswith("perplexity 16.900 → 16.800, tasks solved 0.300 → 0.280")


def test_card_without_task_scores_has_dashes() -> None:
    text = "\n".join(cost_lines(MEASURED))
    assert "instructions" not in text and "| 16.800 | – |  |  |" in text
    assert "tasks solved" not in cost_summary(MEASURED)
