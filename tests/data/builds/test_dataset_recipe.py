"""A dataset in one line: its recipe, splits with slices, and the guessed format and kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.recipe.source_settings import FilesSource, SplitPart, parse_split
from align.config.stages.inputs import DataConfig
from align.data.builds.dataset_recipe import dataset_recipe, guess, sources_of
from tests.support.refusals import Refused

COMMIT = "0" * 40


def test_splits_with_slices(refused: Refused) -> None:
    assert parse_split("train") == [SplitPart("train")]
    assert parse_split("train[:10] + test") == [SplitPart("train", None, "10"), SplitPart("test")]
    assert SplitPart("train", "5", "10").bounds() == (5, 10)
    # 10 % and 25 % of 90 rows are rows 9 and 22 (22.5 rounds to the even number, as Python's round does)
    assert SplitPart("train", "10%", "25%").bounds(90) == (9, 22)
    assert SplitPart("train", "-10", None).bounds(90) == (80, None)
    assert SplitPart("train", None, "500").bounds(90) == (0, 90)
    assert SplitPart("train", None, "500").is_stream and not SplitPart("train", "-5", None).is_stream
    for text in ("train[5]", "train[:x]", "train[1:2", "", "train test"):
        refused(parse_split, text)


@pytest.mark.parametrize(
    ("record", "form", "kind"),
    [
        ({"prompt": "q", "completion": "a"}, "prompt_completion", "instructions"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preferences", "preferences"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", "instructions"),
    ],
)
def test_format_and_kind_come_from_the_columns(tmp_path: Path, record: dict[str, Any], form: str, kind: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    guessed = guess(FilesSource(type="files", paths=["rows.jsonl"]), tmp_path)
    assert (guessed.format, guessed.kind) == (form, kind)
    assert guessed.reason.startswith(form)


def test_a_kind_that_is_named_decides_among_the_formats(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    source = FilesSource(type="files", paths=["rows.jsonl"])
    assert guess(source, tmp_path, "prompts").kind == "prompts"
    refused(guess, source, tmp_path, "preferences")


def test_a_list_of_records_under_a_key_is_named_and_read(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"data": [{"prompt": "q", "completion": "a"}] * 3}))
    refused(lambda: guess(FilesSource(type="files", paths=["rows.json"]), tmp_path))
    fields = {"records": "data", "kind": "instructions", "format": "prompt_completion"}
    source = sources_of(DataConfig(dataset="rows.json", **fields), tmp_path)[0]
    assert (source["paths"], source["records"]) == (["rows.json"], "data")
    refused(lambda: dataset_recipe(config(records="data", format="hh_rlhf"), tmp_path))
    refused(DataConfig, recipe="r.yaml", records="data")


def config(**fields: Any) -> DataConfig:
    return DataConfig(**{"dataset": "org/pairs", "revision": COMMIT, "kind": "preferences"} | fields)


def test_the_fields_of_a_source_are_passed_on(tmp_path: Path) -> None:
    mapping = {"columns": {"chosen": "better"}, "keep": ["topic"], "options": {"ignore": ["note"]}}
    (source,) = sources_of(config(license="MIT", name="en", format="preferences", **mapping), tmp_path)
    assert source.pop("options").ignore == ["note"]
    assert {name: source.pop(name) for name in ("columns", "keep")} == {
        "columns": {"chosen": "better"},
        "keep": ["topic"],
    }
    assert source == {
        "type": "hub",
        "dataset": "org/pairs",
        "revision": COMMIT,
        "license": "MIT",
        "format": "preferences",
        "config": "en",
        "split": "train",
    }


def test_a_split_to_hold_out_is_a_source_of_its_own(tmp_path: Path) -> None:
    recipe = dataset_recipe(config(split="train[:5000]", test_split="test"), tmp_path)
    assert [(source.split, source.part) for source in recipe.sources] == [("train[:5000]", "train"), ("test", "test")]
    assert dataset_recipe(config(test_size=0.2), tmp_path).test_size == 0.2
    assert [step.type for step in dataset_recipe(config(format="scored"), tmp_path).steps] == ["pairs"]


def test_all_rows_go_to_the_part_that_is_named(refused: Refused, tmp_path: Path) -> None:
    (source,) = dataset_recipe(config(part="test", test_size=1.0), tmp_path).sources
    assert source.part == "test"
    refused(lambda: dataset_recipe(config(part="train"), tmp_path))
    assert dataset_recipe(config(test_size=0), tmp_path).empty_split == "test"


def test_files_folders_and_globs(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("a.jsonl", "b.csv.gz", "README.md"):
        (tmp_path / "rows" / name).write_text("")

    def paths(dataset: str) -> Any:
        return sources_of(DataConfig(dataset=dataset, kind="texts"), tmp_path)[0]["paths"]

    assert paths("rows/a.jsonl") == ["rows/a.jsonl"]
    assert paths("rows/*.jsonl") == ["rows/*.jsonl"]
    assert paths("rows/") == ["rows/*.csv.gz", "rows/*.jsonl"]
    (tmp_path / "rows").rename(tmp_path / "rows[1]")
    assert paths("rows[1]") == ["rows[[]1]/*.csv.gz", "rows[[]1]/*.jsonl"]
    for dataset in ("pairs.csv", "just-a-word", "./org/pairs"):
        refused(paths, dataset)
    (tmp_path / "pairs.csv").write_text("")
    for dataset in ("pairs.cvs", "./pair.csv"):
        refused(paths, dataset)
    (tmp_path / "empty").mkdir()
    refused(paths, "empty")
    (tmp_path / "empty" / "record.json").write_text("{}")
    refused(paths, "empty")


@pytest.mark.parametrize(
    "fields",
    [
        {"revision": "main"},
        {"test_split": "test"},
        {"split": "train[:5]"},
    ],
)
def test_fields_of_the_hub_mean_nothing_for_files(refused: Refused, tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "rows.csv").write_text("text\nx\n")
    refused(lambda: sources_of(DataConfig(dataset="rows.csv", kind="texts", **fields), tmp_path))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"recipe": "a.yaml", "dataset": "b.csv"},
        {"recipe": "a.yaml", "split": "train"},
        {"recipe": "a.yaml", "format": "alpaca"},
        {"dataset": "b.csv", "files": ["c.csv"]},
        {"dataset": "b.csv", "split": "train[5]"},
        {"dataset": "a/b", "test_split": "test", "part": "train"},
        {"dataset": "a/b", "test_split": "test", "test_size": 0.2},
    ],
)
def test_settings_that_contradict_each_other(refused: Refused, fields: dict[str, Any]) -> None:
    refused(DataConfig, **fields)
