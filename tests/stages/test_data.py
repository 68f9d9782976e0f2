"""The data stage: its config, its identities, and what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from align import Pipeline
from align.config.runtime import Runtime
from align.config.stages.inputs import DataConfig
from align.data.rows import read_rows
from align.pipeline.context import StageContext
from align.stages.data import identities, makes, run
from align.store.artifacts import Kind
from tests.support.refusals import Refused

HUB = {"type": "hub", "dataset": "o/n", "revision": "0" * 40, "format": "gsm8k"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"question": f"q{i}?", "answer": f"so {i}\n#### {i}"}) + "\n" for i in range(40))
    )
    recipe("hub.yaml", HUB, files_variable="ALIGN_TEST_FILES")
    recipe("embedded.yaml", {"type": "embedded", "size": 100})
    return tmp_path


def recipe(name: str, source: dict, **options: object) -> None:
    Path(name).write_text(yaml.safe_dump({"kind": "instructions", "sources": [source], **options}))


def context(config: DataConfig, folder: Path) -> StageContext:
    for name in ("out", "checkpoints"):
        (folder / name).mkdir(exist_ok=True)
    return StageContext(
        "data", config, {}, 0, Runtime(), folder / "out", folder / "checkpoints", folder / "events.jsonl"
    )


def test_run_writes_splits_ledger_and_metrics(here: Path) -> None:
    config = DataConfig(recipe="embedded.yaml")
    assert makes(config) == Kind.INSTRUCTIONS
    metrics = run(context(config, here))
    train, test = read_rows(here / "out" / "train.parquet"), read_rows(here / "out" / "test.parquet")
    ledger = json.loads((here / "out" / "ledger.json").read_text())
    assert (metrics["train_rows"], metrics["test_rows"]) == (len(train), len(test))
    assert ledger["rows_in"] == 100 == len(train) + len(test)
    assert set(train[0]) == {"id", "source", "prompt", "checks", "completion"}
    assert json.dumps(metrics) and "progress" in (here / "events.jsonl").read_text()
    again = run(context(config, here))
    assert again == metrics and read_rows(here / "out" / "train.parquet") == train


def test_prompts_of_one_template_are_warned_of(here: Path) -> None:
    """All of them are on one side, whatever ``test_size`` says."""
    task = "Answer with a list of words that are separated by commas. Reverse the words of this list"
    (here / "template.jsonl").write_text(
        "".join(json.dumps({"question": f"{task}: {i}", "answer": f"so\n#### {i}"}) + "\n" for i in range(30))
    )
    recipe("template.yaml", {"type": "files", "paths": ["template.jsonl", "a.jsonl"], "format": "gsm8k"})
    run(context(DataConfig(recipe="template.yaml"), here))
    events = (here / "events.jsonl").read_text()
    assert "30 of 70 prompts are near-duplicates of one another and stay on one side of the split" in events
    assert "near_duplicate_prompts: null" in events
    shutil.rmtree(here / "out")
    (here / "events.jsonl").unlink()
    recipe("single.yaml", {"type": "files", "paths": ["a.jsonl"], "format": "gsm8k"})
    run(context(DataConfig(recipe="single.yaml"), here))
    assert "warning" not in (here / "events.jsonl").read_text()


def test_files_and_max_rows_override_the_recipe(refused: Refused, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = run(context(DataConfig(recipe="hub.yaml", files=["*.jsonl"], max_rows=30), here))
    assert metrics["rows_in"] == 40 and metrics["dropped"] == {"over max_rows": 10}
    by_field = identities(DataConfig(recipe="hub.yaml", files=["a.jsonl"]), here)
    monkeypatch.setenv("ALIGN_TEST_FILES", "a.jsonl")
    assert identities(DataConfig(recipe="hub.yaml"), here) == by_field
    refused(lambda: identities(DataConfig(recipe="embedded.yaml", files=["a.jsonl"]), here))
    refused(lambda: identities(DataConfig(recipe="hub.yaml", files=["b.jsonl"]), here))


def test_identity_is_the_recipes_content_and_its_files(here: Path) -> None:
    config = DataConfig(recipe="hub.yaml", files=["a.jsonl"])
    first = identities(config, here)
    Path("renamed.yaml").write_text("# a comment\n" + Path("hub.yaml").read_text() + "description: new\n")
    assert identities(DataConfig(recipe="renamed.yaml", files=["./a.jsonl"]), here) == first
    (here / "a.jsonl").write_text((here / "a.jsonl").read_text().replace("q1?", "q1!"))
    assert identities(config, here) != first
    hub = identities(DataConfig(recipe="hub.yaml"), here)
    assert hub["sources[0] o/n"] == "0" * 40
    recipe("hub.yaml", HUB, seed=3)
    assert identities(DataConfig(recipe="hub.yaml"), here)["recipe"] != hub["recipe"]
    assert "version 1" in identities(DataConfig(recipe="embedded.yaml"), here)["sources[0] embedded"]


def test_key_has_content_and_not_path_of_an_evaluation_set(here: Path) -> None:
    def identities_of(place: str) -> dict[str, str]:
        sets = [{"name": "own", "files": [place]}]
        recipe("clean.yaml", {"type": "embedded", "size": 100}, steps=[{"type": "decontaminate", "sets": sets}])
        return identities(DataConfig(recipe="clean.yaml"), here)

    (here / "eval.jsonl").write_text('{"prompt": "what is the answer to everything?"}\n')
    (here / "other").mkdir()
    (here / "other" / "eval.jsonl").write_bytes((here / "eval.jsonl").read_bytes())
    first = identities_of("eval.jsonl")
    assert identities_of("other/eval.jsonl") == first
    (here / "eval.jsonl").write_text('{"prompt": "what is the question?"}\n')
    assert identities_of("eval.jsonl") != first


def test_a_broken_line_writes_nothing(refused: Refused, here: Path) -> None:
    with (here / "a.jsonl").open("a") as file:
        file.write("{broken\n")
    refused(lambda: run(context(DataConfig(recipe="hub.yaml", files=["a.jsonl"]), here)))
    assert list((here / "out").iterdir()) == []


def test_a_build_that_is_killed_goes_on_in_its_next_run(refused: Refused, tmp_path: Path) -> None:
    source = {
        "type": "python",
        "function": "tests.support.data.many_rows:rows",
        "format": "prompt_completion",
        "name": "many",
    }
    content = {
        "kind": "instructions",
        "sources": [source | {"arguments": {"count": 22_000, "folder": str(tmp_path)}}],
        "steps": [{"type": "exact_duplicates"}],
        "near_duplicate_prompts": None,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    stage = {"stage": "data", "recipe": str(tmp_path / "r.yaml")}
    pipeline = Pipeline({"name": "killed", "runtime": {"workers": 2}, "stages": {"data": stage}})

    def ledger(where: Path) -> str:
        return (pipeline.run(store=where).artifacts["data"].path / "ledger.json").read_text()

    (tmp_path / "kill").touch()
    refused(ledger, tmp_path / "store")
    again = ledger(tmp_path / "store")
    assert again == ledger(tmp_path / "whole")
    assert json.loads(again)["dropped"]["duplicate of an earlier row"] > 0
