"""Every block of Python in ``docs/python.md`` runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pandas
import pytest

from align import Pipeline
from tests.examples.conftest import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_page_runs(number: int, finished: list[Pipeline]) -> None:
    pipeline = Pipeline.load("pipelines/quickstart.yaml")
    run = pipeline.run()
    variables = {"Path": Path, "Pipeline": Pipeline, "pandas": pandas, "pipeline": pipeline, "run": run}
    exec(compile(BLOCKS[number], f"block {number}", "exec"), {**variables, "runs": {1: run, 2: run}})


def test_the_page_has_its_blocks() -> None:
    assert len(BLOCKS) == 5
    assert sum("scorecard" in block for block in BLOCKS) == 2
