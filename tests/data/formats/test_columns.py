"""Columns that a recipe keeps travel with their rows through every step, file and stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from align.config.recipe.recipe import Recipe
from align.data.builds import build as building
from align.data.builds.build import build
from align.data.builds.build_files import rows as rows_of
from align.data.builds.ledger import summary_lines
from align.data.rows import Row, assistant, kept_columns, read_rows, take_rows, user, write_rows
from align.data.steps.pairs import make_pairs
from align.report.dataset.preview import write_preview
from tests.support.refusals import Refused


def keeps_easy(row: Row) -> bool:
    """Keep rows of level 1, by a column that the recipe keeps."""
    return bool(row["level"] == 1)


def put(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path.name


@pytest.fixture
def make(tmp_path: Path):
    number = iter(range(100))

    def made(source: dict[str, Any], kind: str = "prompts", **content: Any) -> tuple[list[Row], dict[str, Any], Path]:
        output = tmp_path / f"built{next(number)}"
        output.mkdir()
        recipe = Recipe.model_validate({"kind": kind, "sources": [source], **content})
        ledger = build(recipe, tmp_path, tmp_path / f"{output.name}-work", output)
        (output / "ledger.json").write_text(json.dumps(ledger))
        rows = [row for split in ("train", "test") for row in read_rows(output / f"{split}.parquet")]
        return rows, ledger, output

    return made


def questions(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{i} + 1?", "answer": i + 1, "level": i % 2, "steps": [{"n": i}, "add"], "unit": None}
        for i in range(count)
    ]


def test_kept_columns_pass_filters_and_are_in_the_ledger(make, tmp_path: Path) -> None:
    source = {"type": "files", "name": "sums", "paths": [put(tmp_path / "a.jsonl", questions(40))]}
    source |= {"columns": {"prompt": "question"}, "keep": {"answer": "answer", "level": "level", "parts": "steps"}}
    steps = [{"type": "normalize"}, {"type": "filter", "where": f"{__name__}:keeps_easy"}, {"type": "exact_duplicates"}]
    rows, ledger, folder = make(source, steps=steps)
    assert len(rows) == 20
    for row in rows:
        number = int(row["prompt"][0]["content"].split()[0])
        assert (row["answer"], row["level"], row["parts"]) == (number + 1, 1, [{"n": number}, "add"])
    assert ledger["sources"][0]["kept_fields"] == {"answer": 40, "level": 40, "parts": 40}
    assert "  columns that stay with the rows, and in how many: answer (40), level (40), parts (40)" in list(
        summary_lines(ledger)
    )
    page = write_preview(folder, {}, "sums").read_text()
    assert "parts</span>" in page and "&#34;add&#34;]" in page
    # a plain column is one for everybody who reads the Parquet file
    schema = pq.read_schema(next(folder.glob("train-*")))
    assert (str(schema.field("answer").type), str(schema.field("parts").type)) == ("int64", "string")


def test_a_column_that_nobody_uses_is_named_with_the_remedy(make, tmp_path: Path) -> None:
    source = {"type": "files", "name": "sums", "paths": [put(tmp_path / "a.jsonl", questions(12))]}
    _, ledger, _ = make(source | {"columns": {"prompt": "question"}, "keep": ["answer"]})
    lines = [line for line in summary_lines(ledger) if "not used" in line]
    assert lines == [
        "  fields that were not used, and in how many rows' records: level (12), steps (12) "
        '(keep: [level] keeps them as row["level"] and so on)'
    ]


def test_values_of_several_types_come_back_as_they_were(make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(building, "SHARD_ROWS", 5)
    gold: list[Any] = [*range(10), *(f"text {i}" for i in range(10)), *([i, None] for i in range(10)), 2**70, 0.5, True]
    records = [{"prompt": f"question number {i}", "gold": value} for i, value in enumerate(gold)]
    source = {"type": "files", "paths": [put(tmp_path / "a.jsonl", records)], "keep": ["gold"]}
    rows, _, folder = make(source, near_duplicate_prompts=None)
    values = {row["prompt"][0]["content"]: row["gold"] for row in rows}
    assert values == {f"question number {i}": value for i, value in enumerate(gold)}
    assert [type(values[f"question number {i}"]) for i in (0, 30, 31, 32)] == [int, int, float, bool]
    # the same through the other readers
    assert {row["prompt"][0]["content"]: row["gold"] for row in rows_of(folder, "train")}.items() <= values.items()
    # and from an earlier build, or from files of rows
    again, _, _ = make({"type": "files", "paths": [str(folder / "*-of-*.parquet")], "format": "rows"}, on_error="drop")
    assert {row["prompt"][0]["content"]: row["gold"] for row in again} == values


def test_they_stay_with_pairs(make, tmp_path: Path) -> None:
    records = [
        {"prompt": f"q{i}", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}], "gold": f"g{i}"}
        for i in range(12)
    ]
    source = {"type": "files", "paths": [put(tmp_path / "a.jsonl", records)], "keep": ["gold"]}
    rows, _, _ = make(source, "preferences", steps=[{"type": "pairs"}])
    assert len(rows) == 12 and all(row["gold"] == "g" + row["prompt"][0]["content"][1:] for row in rows)
    prompt = {"id": "x", "source": "s", "prompt": [user("q")], "checks": "", "gold": [1], "empty": None}
    (pair,), _ = make_pairs([prompt], [["a", "b"]], [[0.0, 1.0]], "best_worst", noise=0.0, seed=0)
    assert (pair["gold"], "empty" in pair) == ([1], False)


def test_rows_without_kept_columns_are_written_as_before(tmp_path: Path) -> None:
    row = {"id": "x", "source": "s", "prompt": [user("q")], "checks": "", "completion": [assistant("a")], "margin": 0.5}
    write_rows(tmp_path / "a.parquet", [row])
    assert not any(field.metadata for field in pq.read_schema(tmp_path / "a.parquet"))
    assert kept_columns(row) == {"margin": 0.5}
    import numpy as np

    write_rows(tmp_path / "b.parquet", [row | {"gold": {"a": 1}}, row])
    assert [found["gold"] for found in take_rows(tmp_path / "b.parquet", np.array([1, 0]))] == [None, {"a": 1}]


def test_a_python_source_keeps_its_checks(make, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "generators_of_checks.py").write_text(
        'def rows():\n    for i in range(12):\n        yield {"prompt": f"say {i}", "checks": {"answer": str(i)}}\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows, ledger, _ = make({"type": "python", "function": "generators_of_checks:rows"})
    assert {row["checks"] for row in rows} == {json.dumps({"answer": str(i)}) for i in range(12)}
    assert ledger["sources"][0]["unused_fields"] == {}


def test_a_kept_column_that_no_record_has_is_an_error(refused: Refused, make, tmp_path: Path) -> None:
    source = {"type": "files", "name": "sums", "paths": [put(tmp_path / "a.jsonl", questions(5))]}
    refused(make, source | {"keep": ["anwser"]})


def test_a_path_that_leads_nowhere_is_an_error(refused: Refused, make, tmp_path: Path) -> None:
    records = [{"prompt": f"say {number}", "meta": {"level": number}} for number in range(5)]
    source = {"type": "files", "name": "sums", "paths": [put(tmp_path / "a.jsonl", records)]}
    refused(make, source | {"keep": {"level": "{meta.levle}"}})
    rows, _, _ = make(source | {"keep": {"level": "{meta.level}", "hint": "{meta.hint?}"}})
    assert sorted(row["level"] for row in rows) == list(range(5))
