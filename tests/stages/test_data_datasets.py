"""The data stage on a dataset in one line: from files, and from a Hub that its real clients read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from align import Pipeline
from align.data.rows import read_rows
from align.store.artifacts import Kind
from tests.support.hub_server import HubServer, environment, online_hub
from tests.support.refusals import Refused

__all__ = ["online_hub"]

pytestmark = pytest.mark.usefixtures("stages_in_process")
CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train.jsonl
  - split: test
    path: data/test.jsonl
---
"""


def pairs(count: int, word: str) -> bytes:
    rows = [
        {"prompt": f"{word} {n} {chr(97 + n % 26) * 9}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def pipeline(**data: Any) -> Pipeline:
    return Pipeline({"name": "one-line", "stages": {"data": data}})


def test_unused_columns_of_a_dataset_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"question {n} {chr(97 + n % 26) * 9},{n % 4},w,x,y,z,easy" for n in range(40)]
    Path("mmlu.csv").write_text("\n".join(["question,answer,choice0,choice1,choice2,choice3,level", *lines]))
    artifact = pipeline(dataset="mmlu.csv").run(store=tmp_path / "store").artifacts["data"]
    events = (artifact.path / "events.jsonl").read_text()
    assert "fields that were not used, and in how many rows' records: level (40)" in events
    rows = read_rows(artifact.path / "train.parquet")
    assert all("\n\nA. w\nB. x\nC. y\nD. z" in row["prompt"][0]["content"] for row in rows)


def test_a_csv_in_one_line_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"question {n} {chr(97 + n % 26) * 9},good {n},bad {n}" for n in range(40)]
    Path("pairs.csv").write_text("\n".join(["prompt,chosen,rejected", *lines]))
    checked = pipeline(dataset="pairs.csv")
    node = checked.nodes["data"]
    assert node.makes == Kind.PREFERENCES
    assert checked.pins == {"data": {"format": "preferences", "kind": "preferences"}}
    artifact = checked.run(store=tmp_path / "store").artifacts["data"]
    rows = [row for split in ("train", "test") for row in read_rows(artifact.path / f"{split}.parquet")]
    assert len(rows) == 40
    # A recipe that says the same has the same key, and so has the file under another name.
    Path("recipe.yaml").write_text(
        yaml.safe_dump(
            {"kind": "preferences", "sources": [{"type": "files", "paths": ["pairs.csv"], "format": "preferences"}]}
        )
    )
    assert pipeline(recipe="recipe.yaml").nodes["data"].key == node.key
    Path("pairs.csv").write_text(Path("pairs.csv").read_text() + "\nmore,a,b")
    assert pipeline(dataset="pairs.csv").nodes["data"].key != node.key


def test_columns_of_no_format_are_named_when_planned(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd.csv").write_text("a,b\n1,2\n")
    refused(pipeline, dataset="odd.csv")
    refused(pipeline, dataset="gone.csv")


@pytest.fixture
def commit(online_hub: HubServer) -> str:
    files = {"README.md": CARD, "data/train.jsonl": pairs(50, "train"), "data/test.jsonl": pairs(5, "test")}
    return online_hub.repository("datasets/org/pairs").commit(files)


PROGRAM = """
import json, sys
from align import Pipeline
pipeline = Pipeline({"name": "x", "stages": {"data": json.loads(sys.argv[1])}})
run = pipeline.run(store=sys.argv[2])
print(json.dumps({"pins": pipeline.pins, "path": str(run.artifacts["data"].path)}))
"""


def test_a_dataset_of_the_hub_in_one_line(online_hub: HubServer, commit: str, tmp_path: Path) -> None:
    """In a process of its own: datasets reads the Hub's address when it is imported."""
    block = {"dataset": "org/pairs", "split": "train[:30]", "test_split": "test"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(block), str(tmp_path / "store")],
        env={**os.environ, **environment(online_hub, tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["pins"] == {"data": {"revision": commit, "format": "preferences", "kind": "preferences"}}
    train, test = (read_rows(Path(answer["path"]) / f"{name}.parquet") for name in ("train", "test"))
    assert (len(train), len(test)) == (30, 5)
    assert all(row["prompt"][0]["content"].startswith("train") for row in train)
    # The guess is remembered, so that a later command reads no row.
    before = [line for line in online_hub.requests if "train.jsonl" in line]
    planned = pipeline(**block)
    assert planned.pins == answer["pins"]
    assert [line for line in online_hub.requests if "train.jsonl" in line] == before


def test_what_the_hub_does_not_have(refused: Refused, online_hub: HubServer, commit: str) -> None:
    refused(pipeline, dataset="org/piars")
    refused(pipeline, dataset="org/pairs", revision="v9")


def test_misspelled_column_is_refused_before_the_run(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"question": "why?", "answer": "because"}) + "\n")
    columns = {"prompt": "quesion", "completion": "answer"}
    refused(pipeline, dataset="rows.jsonl", format="prompt_completion", columns=columns)
    source = {"type": "files", "paths": ["rows.jsonl"], "format": "prompt_completion", "columns": columns}
    Path("recipe.yaml").write_text(yaml.safe_dump({"kind": "instructions", "sources": [source]}))
    refused(pipeline, recipe="recipe.yaml")
