"""Relative paths start at the YAML file that names them."""

from pathlib import Path

import pytest

from align import Pipeline
from align.cli.suite import load_suite
from align.config.recipe.recipe import load_recipe
from align.extensions.sweep.config import load_sweep
from tests.support.refusals import Refused

RECIPE = "kind: prompts\nsources: [{type: files, paths: [rows.jsonl], format: prompt}]\n"
PIPELINE = "name: p\nstages:\n  model: {source: tiny}\n  data: {recipe: recipes/r.yaml}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the current folder beside it."""
    folder = tmp_path / "project"
    (folder / "recipes").mkdir(parents=True)
    (folder / "p.yaml").write_text(PIPELINE)
    (folder / "recipes" / "r.yaml").write_text(RECIPE)
    (folder / "recipes" / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def test_a_pipeline_and_its_recipe_each_start_at_their_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Pipeline.load(project / "p.yaml").nodes["data"].key
    assert Pipeline.load("../project/p.yaml").nodes["data"].key == key
    monkeypatch.chdir(project)
    here = Pipeline.load("p.yaml")
    assert here.nodes["data"].key == key, "keys count contents, not paths"
    assert here.raw["stages"]["data"]["recipe"] == "recipes/r.yaml"
    assert load_recipe("recipes/r.yaml", Path.cwd()).sources[0].paths == ["recipes/rows.jsonl"]  # type: ignore[union-attr]


def test_base_file_and_set_value_start_at_their_folders(project: Path) -> None:
    (project / "deep").mkdir()
    (project / "deep" / "q.yaml").write_text("extends: ../p.yaml\nname: q\n")
    assert (
        Pipeline.load(project / "deep" / "q.yaml").nodes["data"].key
        == Pipeline.load(project / "p.yaml").nodes["data"].key
    )
    Path("mine.yaml").write_text(RECIPE.replace("rows.jsonl", "../project/recipes/rows.jsonl"))
    changed = Pipeline.load(project / "p.yaml", ["stages.data.recipe=mine.yaml"])
    assert changed.raw["stages"]["data"]["recipe"] == "mine.yaml"


def test_a_dictionary_starts_at_its_base(refused: Refused, project: Path) -> None:
    values = {"name": "p", "stages": {"data": {"recipe": "recipes/r.yaml"}}}
    key = Pipeline.load(project / "p.yaml").nodes["data"].key
    assert Pipeline.from_dict(values, base=project).nodes["data"].key == key
    refused(Pipeline.from_dict, values)


def test_a_path_of_the_old_rule_is_refused_with_the_new_one(refused: Refused, project: Path) -> None:
    Path("recipes").mkdir()
    Path("recipes/only_here.yaml").write_text(RECIPE)
    (project / "p.yaml").write_text(PIPELINE.replace("r.yaml", "only_here.yaml"))
    project / "recipes" / "only_here.yaml"
    refused(Pipeline.load, project / "p.yaml")


def test_a_missing_file_is_named_in_full(refused: Refused, project: Path) -> None:
    (project / "recipes" / "r.yaml").write_text(RECIPE.replace("rows", "gone"))
    refused(Pipeline.load, project / "p.yaml")


def test_names_are_no_paths(project: Path) -> None:
    (project / "tiny").mkdir()
    assert Pipeline.load(project / "p.yaml").raw["stages"]["model"]["source"] == "tiny"


def test_a_sweep_and_a_suite_start_at_their_folder(project: Path) -> None:
    sweep = "name: s\npipeline: p.yaml\nspace: {stages.data.max_rows: [2, 3]}\nmaximize: data.train_rows\n"
    (project / "s.yaml").write_text(sweep)
    assert load_sweep(project / "s.yaml").pipeline == str(project / "p.yaml")
    (project / "suite.yaml").write_text("prompts: recipes/r.yaml\n")
    assert load_suite(str(project / "suite.yaml")).rows["prompts"] == str(project / "recipes" / "r.yaml")
