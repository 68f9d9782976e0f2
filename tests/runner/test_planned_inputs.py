"""Files that change between the plan of a stage and its end are refused, and older results of such runs are found."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align import Pipeline
from align.data.rows import read_rows
from align.errors import UserError
from align.models.checkpoints import source
from align.runner.runner import run_pipeline
from align.stages import data
from align.store.store import Store
from tests.support import in_process
from tests.support.records import change_record
from tests.support.runs import Recorder

RECIPE = """kind: instructions
sources:
  - {type: files, paths: ["rows/*"], format: messages}
test_size: 0.25
"""


def rows(answer: str) -> list[dict[str, Any]]:
    questions = ("Who?", "What is it?", "When was that?", "Why do you ask?", "Which of them?", "How many are there?")
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{answer} {text}"}]}
        for text in questions
    ]


def write_rows(path: Path, answer: str) -> None:
    """Write rows in the format that the name of the file says."""
    text = "".join(json.dumps(row) + "\n" for row in rows(answer)).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows(answer)), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text, mtime=0))
    else:
        path.write_bytes(text)


@pytest.fixture(params=["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    path = tmp_path / "rows" / request.param
    write_rows(path, "old")
    return path


def pipeline() -> Pipeline:
    return Pipeline.from_dict({"name": "t", "stages": {"data": {"recipe": "recipe.yaml"}}})


def run(planned: Pipeline) -> None:
    with in_process.stages():
        run_pipeline(planned, store="store", listener=Recorder())


def swap(path: Path) -> None:
    """Replace a file's rows by others of the same size and modification time."""
    times = path.stat()
    write_rows(path, "new")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def add_file(path: Path) -> None:
    write_rows(path.with_name(f"other-{path.name}"), "other")


def change_recipe(path: Path) -> None:
    recipe = path.parent.parent / "recipe.yaml"
    recipe.write_text(RECIPE.replace("0.25", "0.5"))


CHANGES = [swap, add_file, change_recipe]


def require_refusal(planned: Pipeline, match: str) -> None:
    with pytest.raises(UserError, match=match):
        run(planned)
    assert Store.open(Path("store")).find("data", planned.nodes["data"].key, "data") is None


@pytest.mark.parametrize("change", CHANGES)
def test_change_before_the_stage_reads_is_refused(file: Path, change: Callable[[Path], None]) -> None:
    planned = pipeline()
    change(file)
    require_refusal(planned, "content has changed since this run was started")


@pytest.mark.parametrize("change", CHANGES)
def test_change_while_the_stage_reads_is_refused(
    file: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = data.run

    def changing(context: Any) -> dict[str, Any]:
        metrics = read(context)
        change(file)
        return metrics

    monkeypatch.setattr(data, "run", changing)
    require_refusal(pipeline(), "content has changed since this run was started")


def test_change_back_is_refused_and_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = data.run

    def changing(context: Any) -> dict[str, Any]:
        write_rows(file, "new")
        metrics = read(context)
        write_rows(file, "old")
        return metrics

    planned = pipeline()
    monkeypatch.setattr(data, "run", changing)
    require_refusal(planned, "changed while the stage read it")
    # The next attempt must not continue from the rows that were read in between.
    monkeypatch.setattr(data, "run", read)
    run(planned)
    artifact = Store.open(Path("store")).find("data", planned.nodes["data"].key, "data")
    assert artifact is not None
    answers = [row["completion"][-1]["content"] for row in read_rows(artifact.path / "train.parquet")]
    assert answers
    assert all(answer.startswith("old ") for answer in answers)


def test_verify_finds_rows_of_another_file(file: Path) -> None:
    planned = pipeline()
    run(planned)
    store = Store.open(Path("store"))
    artifact = store.find("data", planned.nodes["data"].key, "data")
    assert artifact is not None
    assert not store.problems(artifact, thorough=True)
    # An earlier align stored such an artifact: its key names the planned file, its ledger the file that was read.
    record = json.loads((artifact.path / "record.json").read_text())
    place = next(name for name in record["identities"] if name.startswith("sources[0]"))
    record["identities"][place] = "sha256:" + "0" * 64
    change_record(artifact.path, identities=record["identities"])
    again = store.find("data", planned.nodes["data"].key, "data")
    assert again is not None
    problems = store.problems(again, thorough=True)
    assert [problem.path.name for problem in problems] == ["ledger.json"]


CODE = """def rows():
    for number in range(8):
        answer = {"role": "assistant", "content": f"old {number}"}
        yield {"messages": [{"role": "user", "content": f"{number}?"}, answer]}
"""


@pytest.mark.parametrize("reads_first", [False, True])
def test_changed_generator_is_refused(reads_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"generator_of_test_{reads_first}".lower()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / f"{module}.py"
    code.write_text(CODE)
    (tmp_path / "recipe.yaml").write_text(
        f"kind: instructions\nsources: [{{type: python, function: '{module}:rows', format: messages}}]\n"
    )
    planned = pipeline()
    read = data.run

    def changing(context: Any) -> dict[str, Any]:
        metrics = read(context)
        code.write_text(CODE.replace("old", "new"))
        return metrics

    if reads_first:
        monkeypatch.setattr(data, "run", changing)
    else:
        code.write_text(CODE.replace("old", "new"))
    require_refusal(planned, "its code has changed since this run was started")


def test_model_with_an_old_time_has_another_identity(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    before = source._digest(path)
    times = path.stat()
    path.write_bytes(b"new")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert source._digest(path) != before
