"""Extensions: found in folders and in distributions, listed, refused by name, and used like align's own parts."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from align import registry
from align.errors import UserError
from align.registry import Command, Extension, Found, NoModule, Stage, found, load

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
PATH = re.compile(r"align(\.\w+)+(:\w+)?")
QUESTIONS = '{"question": "Name a river."}\n{"question": "Name a comet."}\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the page's files, and the distribution that pip would have installed from them."""
    for name, text in TITLED.findall(PAGE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    install(tmp_path, "terse", "terse:EXTENSION")
    (tmp_path / "questions.jsonl").write_text(QUESTIONS)
    (tmp_path / "data_recipes").symlink_to(ROOT / "data_recipes")
    return tmp_path


def install(folder: Path, name: str, path: str) -> None:
    (folder / f"{name}-1.dist-info").mkdir()
    (folder / f"{name}-1.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (folder / f"{name}-1.dist-info" / "entry_points.txt").write_text(f"[align.extensions]\n{name} = {path}\n")


def align(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "align.cli.main", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_documented_extension_runs(project: Path) -> None:
    """Its stage, score, task and command, from a folder on the search path."""
    done = align(project, "run", "terse.yaml", "--store", "store", "--json")
    assert done.returncode == 0, done.stderr
    records = {path.parent.parent.name: json.loads(path.read_text()) for path in project.glob("store/*/*/record.json")}
    assert records["terse"]["metrics"]["train_rows"] > 0
    card = json.loads(next(project.glob("store/evaluate/*/scorecard.json")).read_text())
    assert {"terse", "terse.short"} <= set(card["metrics"])
    assert align(project, "words", "questions.jsonl").stdout == "8\n"


def test_extension_is_listed_and_described(project: Path) -> None:
    fields_shown = align(project, "fields", "terse", "max_words")
    assert "Words of the longest answer that is kept." in fields_shown.stdout
    assert "words" in align(project, "--help").stdout
    schema = json.loads(align(project, "schema").stdout)
    assert "max_words" in schema["$defs"]["stage_terse"]["properties"]
    listed = align(project, "doctor", "--json", "--store", "store").stdout
    adds = "stage terse, task terse, score terse, command words"
    assert f"extension terse: short answers ({adds})" in [line["what"] for line in json.loads(listed)]


def test_extension_that_fails_is_named(project: Path) -> None:
    """Neither a record nor settings that do not import keep anything else from working."""
    install(project, "missing", "nowhere:EXTENSION")
    (project / "terse" / "config.py").write_text("import nothing_at_all\n")
    (project / "good.yaml").write_text("name: good\nstages:\n  model: {source: tiny}\n  e: {stage: nowhere}\n")
    planned = align(project, "plan", "good.yaml", "--store", "store")
    assert planned.returncode == 2
    assert "unknown stage 'nowhere'" in planned.stderr
    assert "missing (ModuleNotFoundError: No module named 'nowhere')" in planned.stderr
    (project / "good.yaml").write_text("name: good\nstages:\n  model: {source: tiny}\n")
    assert align(project, "plan", "good.yaml", "--store", "store").returncode == 0
    assert align(project, "schema").returncode == 0
    code = "from align.cli.doctor import _extensions; print(*(finding.text for finding in _extensions()), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(project), str(ROOT)])}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout
    assert "extension missing does not load: ModuleNotFoundError: No module named 'nowhere'" in shown
    assert "extension terse does not load: ModuleNotFoundError: No module named 'nothing_at_all'" in shown
    assert "extension sweep: searches over a pipeline's fields (command sweep, topic sweep)" in shown


def test_name_that_is_taken_is_refused() -> None:
    here = Found({"core": Extension("core", (Command("run", "", ""),))})
    here.add("mine", lambda: Extension("mine", (Command("walk", "", ""), Command("run", "", ""))))
    here.add("other", lambda: "text")
    assert here.failures == {
        "mine": "ValueError: core has the command 'run' already",
        "other": "TypeError: it is a str, not an align.registry.Extension",
    }
    assert list(here.extensions) == ["core"]


def test_missing_module_and_name_are_told_apart() -> None:
    with pytest.raises(NoModule, match="'align.nothing:run': there is no module 'align.nothing' here or installed"):
        load("align.nothing:run")
    with pytest.raises(UserError, match=r"align\.errors has no 'UserEror'\. Did you mean 'UserError'\?"):
        load("align.errors:UserEror")


@pytest.mark.parametrize("name", found().extensions)
def test_paths_of_records_lead_to_code(name: str) -> None:
    """A core's record names no extension, and an extension's record names only its own modules or the core's."""
    assert found().failures == {}
    for added in found().extensions[name].adds:
        for field in fields(added):
            value = getattr(added, field.name)
            for path in value if isinstance(value, tuple) else [value]:
                if not isinstance(path, str) or not PATH.fullmatch(path):
                    continue
                owner = path.partition(":")[0].removeprefix(f"{registry.GROUP}.").split(".")[0]
                assert owner in ("align", name), path
                module, _, attribute = path.partition(":")
                imported = importlib.import_module(module)
                assert not attribute or hasattr(imported, attribute), path


def test_records_import_no_config_and_no_torch() -> None:
    code = "import sys; from align.registry import found; found(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not {"pydantic", "torch", "numpy", "yaml", "align.config"} & set(done.stdout.split())
    assert Stage.__module__ == "align.registry"
