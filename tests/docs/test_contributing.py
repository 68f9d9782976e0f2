"""``docs/contributing.md`` is followed: its files are written as the page has them, and its pipeline is run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from align import Pipeline
from align.data.rows import read_rows
from align.errors import StageFailed, UserError
from align.pipeline.registry import STAGES, Stage, load_object
from align.store.artifacts import Artifact

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the page's files and the recipe they name, as the current folder."""
    files = dict(TITLED.findall(PAGE))
    assert set(files) == {"mypackage/config.py", "mypackage/run.py", "short.yaml"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "data_recipes").symlink_to(ROOT / "data_recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "mypackage"]:
        monkeypatch.delitem(sys.modules, name)  # another test's
    return tmp_path


def answer_lengths(artifact: Artifact) -> list[int]:
    return [len(row["completion"][-1]["content"].split()) for row in read_rows(artifact.split("train"))]


@pytest.mark.usefixtures("stages_in_process")
def test_the_stage_of_the_page_runs_and_is_cached(project):
    """One test for the whole page, because each run builds the dataset in a process."""
    pipeline = Pipeline.load("short.yaml")
    store = project / "store"
    run = pipeline.run(store=store)
    assert run.ran == ["data", "short"]
    data, short = run.artifacts["data"], run.artifacts["short"]
    short_lengths = [length for length in answer_lengths(data) if length <= 8]
    assert 0 < len(short_lengths) < len(answer_lengths(data))
    assert answer_lengths(short) == short_lengths
    assert run.metrics("short")["train_rows"] == len(short_lengths)
    assert pipeline.run(store=store).ran == []

    stricter = pipeline.set("stages.short.max_words=3").run(store=store)
    assert stricter.ran == ["short"]
    assert max(answer_lengths(stricter.artifacts["short"])) <= 3


def test_a_mistake_in_the_stage_of_the_page_is_refused_at_its_place(project):
    pipeline = Pipeline.load("short.yaml")
    with pytest.raises(UserError, match=r"stages\.short: unknown key 'max_word'\. Did you mean 'max_words'\?"):
        pipeline.set("stages.short.max_word=3")
    with pytest.raises(UserError, match=r"stages\.short\.max_words: .*1"):
        pipeline.set("stages.short.max_words=0")


def test_an_error_of_the_run_reaches_the_user(project, tmp_path):
    source = (tmp_path / "mypackage" / "run.py").read_text(encoding="utf-8")
    assert "if not counts" in source
    (tmp_path / "mypackage" / "run.py").write_text(source.replace("if not counts", "if counts"), encoding="utf-8")
    with pytest.raises((UserError, StageFailed), match="no answer has 8 words or fewer; raise max_words"):
        Pipeline.load("short.yaml").run(store=tmp_path / "store")


def test_the_places_that_the_page_names_for_a_stage_of_align_exist():
    """Every kind has its run file where the page says, and the registry that it names holds it."""
    assert load_object("align.pipeline.registry:STAGES") is STAGES
    assert "`align/pipeline/registry.py`" in PAGE
    for kind, stage in STAGES.items():
        assert isinstance(stage, Stage)
        assert stage.run == f"align.stages.{kind}:run"
        assert (ROOT / "align" / "stages" / f"{kind}.py").is_file()
    assert (ROOT / "align" / "config" / "stages").is_dir()
