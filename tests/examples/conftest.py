"""Examples run as their reader runs them: from the folder of the clone, with a store of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot

from align import Pipeline, Run
from tests.support.finished_runs import publish_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ALIGN_STORE", str(tmp_path / "store"))
    pyplot.switch_backend("Agg")  # now: it registers itself with an IPython that is there, such as a stand-in
    return tmp_path / "store"


@pytest.fixture
def finished(store: Path, monkeypatch: pytest.MonkeyPatch) -> list[Pipeline]:
    """Every pipeline that an example runs is finished already, with invented numbers; returns those pipelines."""
    pipelines: list[Pipeline] = []
    run = Pipeline.run

    def publish_and_run(pipeline: Pipeline, **options: Any) -> Run:
        pipelines.append(pipeline)
        # Seeds differ in how lucky they are, so that means and deviations can be checked.
        publish_run(pipeline, store, luck=0.1 * pipeline.config.seed)
        return run(pipeline, **{**options, "store": store})

    monkeypatch.setattr(Pipeline, "run", publish_and_run)
    return pipelines
