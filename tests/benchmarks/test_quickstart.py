"""The floors of the quickstart's stages, by hand, and the table of a store without a finished run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.config.tuning import FullTuning
from align.models.compute.model_types import architecture_of
from align.models.model_plan import TINY_SIZES
from align.pipeline.pipeline import Pipeline
from align.runner.open_store import open_store
from benchmarks.quickstart import PIPELINE, Work, table, work_of

MODEL = architecture_of({**TINY_SIZES, "num_attention_heads": 2})
FORWARD = 2 * MODEL.matrices
"""Operations of a token's pass without the head."""


def node(kind: str) -> Any:
    return SimpleNamespace(stage=SimpleNamespace(kind=kind), config=SimpleNamespace(tuning=FullTuning()))


@pytest.mark.parametrize(
    ("kind", "metrics", "work"),
    [
        # 10 rows of 10 tokens learned (3 passes); 5 held-out rows of 10 tokens, read before and after
        (
            "sft",
            {"tokens": 100, "rows": 10, "test_rows": 5, "test_loss_before": 2.0, "test_loss_after": 1.0},
            Work((3 * 100 + 2 * 50) * FORWARD),
        ),
        # held-out pairs after training only; the reference reads all 150 tokens
        (
            "dpo",
            {"tokens": 100, "pairs": 10, "test_pairs": 5, "test_loss_after": 1.0},
            Work((3 * 100 + 50 + 150) * FORWARD),
        ),
        ("sample", {"tokens": 100}, Work(sampled=100)),
        ("ppo", {"tokens": 100}, Work((4 + 2 * 3) * 100 * FORWARD, 100)),
        ("evaluate", {"tokens": 100}, Work(3 * 100 * FORWARD, 100)),
        ("report", {}, Work()),
    ],
)
def test_the_work_of_a_stage_by_hand(kind: str, metrics: dict[str, Any], work: Work) -> None:
    counted = work_of(node(kind), {"metrics": metrics}, MODEL)
    assert (counted.flops, counted.sampled) == (pytest.approx(work.flops), work.sampled)


def test_a_floor_is_arithmetic_and_sampling_one_after_the_other() -> None:
    assert Work(flops=600, sampled=50).floor(peak=100, rate=10) == 11


def test_a_store_without_the_run_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no finished model, data, sft"):
        table(Pipeline.load(PIPELINE), open_store(None, tmp_path), 1.0, 1.0)
