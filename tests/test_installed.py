"""The wheel, installed outside the clone: everything that the commands name comes with it."""

import json
import zipfile
from pathlib import Path

import pytest

from tests.support.installed import InstalledAlign


def test_wheel_has_only_shipped_files(installed_align: InstalledAlign) -> None:
    names = zipfile.ZipFile(installed_align.wheel).namelist()
    shipped = {name.removeprefix("align/shipped/") for name in names if name.startswith("align/shipped/")}
    in_repository = {
        str(path)
        for folder in ("pipelines", "data_recipes", "examples")
        for path in Path(folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert shipped == in_repository
    # The package and its metadata, and no tests, benchmarks or docs.
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"align", "align_pipeline"}
    assert "align/config/options/field_dumps.json" in names


def test_commands_find_shipped_files_from_an_empty_folder(installed_align: InstalledAlign, tmp_path: Path) -> None:
    planned = installed_align.run("plan", "smoke", "--json", folder=tmp_path)
    assert planned.returncode == 0, planned.stderr
    steps = json.loads(planned.stdout)
    assert [step["stage"] for step in steps][:3] == ["model", "data", "sft"] and len(steps) == 9
    assert {step["action"] for step in steps} == {"run"}

    started = installed_align.run("init", "sft", "--output", "first", folder=tmp_path)
    assert started.returncode == 0, started.stderr
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"sft.yaml", "sft.jsonl", "align.schema.json"}
    again = installed_align.run("init", "sft", "--output", "first", folder=tmp_path)
    assert again.returncode == 2 and "is there already, and nothing is overwritten" in again.stderr
    # A path in the YAML starts at its folder, wherever the command is given.
    planned = installed_align.run("plan", "first/sft.yaml", "--set", "stages.model.source=tiny", folder=tmp_path)
    assert planned.returncode == 0 and "report" in planned.stdout, planned.stderr


def test_a_stage_of_a_shipped_pipeline_runs(installed_align: InstalledAlign, tmp_path: Path) -> None:
    done = installed_align.run("run", "smoke", "--only", "data", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = installed_align.run("list", "--json", folder=tmp_path)
    assert "data" in shown.stdout, shown.stdout + shown.stderr


@pytest.mark.slow
def test_the_smoke_pipeline_runs(installed_align: InstalledAlign, tmp_path: Path) -> None:
    done = installed_align.run("run", "smoke", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Report:" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["store"], "a run writes into its store alone"
