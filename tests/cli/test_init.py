"""``align init``: every starting point is complete, loads and plans where it was copied to."""

import json
import sys
from pathlib import Path

import pytest

from align import Pipeline
from align.cli.init import write_starting_point
from align.cli.main import main
from align.config.shipped import starting_points
from align.pipeline.json_schema import pipeline_schema

PIPELINES = ("quickstart", "sft", "dpo", "ppo", "grpo", "eval")


@pytest.mark.parametrize("name", PIPELINES)
def test_a_starting_point_is_planned_from_anywhere(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_STORE", str(tmp_path / "store"))
    written = write_starting_point(name, tmp_path / "mine")
    text = (tmp_path / "mine" / f"{name}.yaml").read_text()
    assert text.startswith("# ") and text.count("  # ") >= 3, "comments say what to change"
    monkeypatch.setattr("sys.path", [*sys.path])
    assert main(["plan", str(tmp_path / "mine" / f"{name}.yaml"), "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)
    assert len(steps) >= 5 and {step["action"] for step in steps} == {"run"}
    assert all(path.is_file() for path in written)


def test_the_quickstart_keeps_its_keys(tmp_path: Path) -> None:
    write_starting_point("quickstart", tmp_path)
    copied = Pipeline.load(tmp_path / "quickstart.yaml")
    assert {node.name: node.key for node in copied} == {
        node.name: node.key for node in Pipeline.load("pipelines/quickstart.yaml")
    }


def test_editors_find_the_schema_of_a_pipeline(tmp_path: Path) -> None:
    written = [*write_starting_point("sft", tmp_path), *write_starting_point("dpo", tmp_path)]
    assert [path.name for path in written].count("align.schema.json") == 1
    schema = json.loads((tmp_path / "align.schema.json").read_text())
    assert schema == pipeline_schema()
    for name in ("sft", "dpo"):
        modeline = (tmp_path / f"{name}.yaml").read_text().partition("\n")[0]
        path = modeline.removeprefix("# yaml-language-server: $schema=")
        assert (tmp_path / path).samefile(tmp_path / "align.schema.json")
    write_starting_point("data", tmp_path)  # a recipe, which is no pipeline
    assert "$schema" not in (tmp_path / "data.yaml").read_text()


def test_the_data_is_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_starting_point("data", tmp_path)
    assert main(["data", "build", str(tmp_path / "data.yaml"), "--store", str(tmp_path / "store"), "--json"]) == 0
    document = json.dumps(json.loads(capsys.readouterr().out))
    assert "train" in document


def test_sft_runs_at_smoke_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_starting_point("sft", tmp_path)
    settings = [
        "stages.model.source=tiny", "stages.sft.max_steps=1", "stages.sft.batch_size=2",
        "runtime.engine.name=transformers", "stages.sft.tuning={method: full}",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    store = ["--store", str(tmp_path / "store")]
    for stage in ("model", "data", "sft"):
        assert main(["run", str(tmp_path / "sft.yaml"), *words, *store, "--only", stage]) == 0
    assert "sft" in capsys.readouterr().out


def test_init_without_name_lists_and_typo_gets_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    listed = capsys.readouterr().out
    assert set(starting_points()) == {*PIPELINES, "data"} and next(iter(starting_points())) == "quickstart"
    assert all(f"\n{name} " in f"\n{listed}" for name in starting_points())
    assert main(["init", "dop"]) == 2
    assert "there is no starting point 'dop'. Did you mean 'dpo'?" in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sft.jsonl").write_text("mine")
    assert main(["init", "sft", "--output", str(tmp_path)]) == 2
    assert "sft.jsonl is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sft.jsonl"]
    assert (tmp_path / "sft.jsonl").read_text() == "mine"


def test_a_bare_name_is_a_shipped_pipeline_and_a_file_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "smoke"]) == 0
    assert "ppo" in capsys.readouterr().out
    assert main(["plan", "smok"]) == 2
    assert "no shipped pipeline of this name. Did you mean 'smoke'?" in capsys.readouterr().err
    (tmp_path / "smoke").write_text("name: mine\nstages: {model: {source: tiny}}\n")
    assert main(["plan", "smoke"]) == 0
    assert "ppo" not in capsys.readouterr().out
