"""Sources of every kind: what they read, their identities, and what an unreadable one gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.config.base import Config
from align.config.recipe.source_settings import (
    ArtifactSource,
    EmbeddedSource,
    FilesSource,
    HubSource,
    InputSource,
    PythonSource,
    labels,
)
from align.config.validation import validate
from align.data.families import embedded
from align.data.rows import BadRecord, assistant, user, write_rows
from align.data.sources import Item, choose_format, find_files, identity, read
from tests.support.damage import flip_last_bit
from tests.support.records import put_record
from tests.support.refusals import Refused

ZEROS = "0" * 40


def records(items: Iterator[Item]) -> list[dict[str, Any]]:
    actual = list(items)
    assert not any(isinstance(item, BadRecord) for item in actual), actual
    return [item[1] for item in actual if not isinstance(item, BadRecord)]


def source(*paths: str, **more: Any) -> FilesSource:
    return FilesSource(type="files", paths=list(paths), **more)


def test_files_by_path_and_glob_each_once(refused: Refused, tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        (tmp_path / name).write_text(json.dumps({"a": name}) if name != "c.csv" else "a\nc.csv\n")
    assert [r["a"] for r in records(read(source("*"), tmp_path))] == ["a.jsonl", "b.jsonl", "c.csv"]
    assert [p.name for p in find_files(["c.csv", "*.jsonl", "a.*"], tmp_path)] == ["c.csv", "a.jsonl", "b.jsonl"]
    refused(find_files, ["a.jsonll"], tmp_path)
    (tmp_path / "f.xml").write_text("x")
    refused(find_files, ["f.xml"], tmp_path)


def test_brackets_in_a_folder_or_a_files_name_are_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "project[1]"
    folder.mkdir()
    for name in ("a.jsonl", "data[v1].jsonl", "datav.jsonl"):
        (folder / name).write_text("{}\n")
    for pattern, names in {
        "a.jsonl": ["a.jsonl"],
        "data[v1].jsonl": ["data[v1].jsonl"],
        "data[vw].jsonl": ["datav.jsonl"],
        "*.jsonl": ["a.jsonl", "data[v1].jsonl", "datav.jsonl"],
    }.items():
        assert [path.name for path in find_files([pattern], folder)] == names
    assert [path.name for path in find_files([str(folder / "a.jsonl")], tmp_path)] == ["a.jsonl"]


def test_identity_of_files_is_their_content(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("{}\n")
    assert identity(source("one/a.jsonl"), tmp_path) == identity(source("two/a.jsonl"), tmp_path)
    assert len(identity(source("*/a.jsonl"), tmp_path)) == 2
    before = identity(source("one/a.jsonl"), tmp_path)
    (tmp_path / "one" / "a.jsonl").write_text("{} \n")
    assert identity(source("one/a.jsonl"), tmp_path) != before


def hub(**more: Any) -> HubSource:
    return HubSource(type="hub", dataset="o/n", revision=ZEROS, format="messages", **more)


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_datasets_are_read_at_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    import datasets

    repository = tmp_path / "repository"
    (repository / "en").mkdir(parents=True)
    lines = [{"messages": [user("a"), assistant(str(number))], "n": number} for number in range(3)]
    (repository / "en" / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    load, request = datasets.load_dataset, {}

    def local(name: str, config: str | None, *, revision: str, **options: Any) -> Any:
        request.update(name=name, config=config, revision=revision, **options)
        return load(str(repository), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    actual = list(read(hub(split="test", data_dir="en", streaming=streaming), tmp_path))
    assert request == {
        "name": "o/n", "config": None, "revision": ZEROS, "data_dir": "en", "split": "test", "streaming": streaming
    }  # fmt: skip
    assert [item[0] for item in actual] == [f"o/n test: record {number}" for number in (1, 2, 3)]
    assert [item[1] for item in actual] == lines
    assert identity(hub(), tmp_path) == {"o/n": ZEROS}


def test_files_of_a_hub_repository_are_read_as_they_are(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "blob.jsonl").write_text('{"a": 1}\n{broken\n')

    def fetched(name: str, file: str, *, repo_type: str, revision: str) -> str:
        assert (name, file, repo_type, revision) == ("o/n", "trees/x.jsonl", "dataset", ZEROS)
        return str(tmp_path / "blob.jsonl")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: ["README.md", "trees/x.jsonl"])
    for pattern in ("trees/x.jsonl", "trees/*", "*"):  # the card is no part of the data
        good, bad = read(hub(files=[pattern]), tmp_path)
        assert good == ("o/n/trees/x.jsonl:1", {"a": 1})
        assert isinstance(bad, BadRecord) and bad.where == "o/n/trees/x.jsonl:2"
    refused(lambda: list(read(hub(files=["tree/*"]), tmp_path)))
    refused(lambda: list(read(hub(files=["LICENSE"]), tmp_path)))


def test_unreachable_hub_names_the_dataset_and_the_way_out(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    def unreachable(*arguments: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'o/n' on the Hub (LocalEntryNotFoundError)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused(lambda: list(read(hub(), tmp_path)))


MODULE = """
import numpy


def make(count, word="x"):
    for number in range(count):
        yield {"prompt": f"{word}{number}", "level": numpy.float32(0.5)}
    yield "no record"
    yield {"prompt": "\\ud800"}
    raise KeyError("gone")
"""


def test_generators_of_ones_own(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_for_sources.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    new_source = PythonSource(type="python", function="made_for_sources:make", arguments={"count": 2, "word": "y"})
    items = read(new_source, tmp_path)
    assert next(items) == ("made_for_sources:make: record 1", {"prompt": "y0", "level": 0.5})
    assert next(items) == ("made_for_sources:make: record 2", {"prompt": "y1", "level": 0.5})
    odd, half = next(items), next(items)
    assert isinstance(odd, BadRecord) and odd.where == "made_for_sources:make: record 3"
    assert isinstance(half, BadRecord) and "surrogate" in half.problem
    refused(next, items)
    before = identity(new_source, tmp_path)
    assert list(before) == ["made_for_sources:make"] and "sha256:" in before["made_for_sources:make"]
    (tmp_path / "made_for_sources.py").write_text(MODULE + "# more\n")
    assert identity(new_source, tmp_path) != before
    missing = new_source.model_copy(update={"function": "made_for_sources:mak"})
    refused(lambda: list(read(missing, tmp_path)))


def artifact(folder: Path, key: str = "a" * 64) -> Path:
    row = {"id": "1", "source": "s", "prompt": [user("a")], "checks": ""}
    folder.mkdir()
    write_rows(folder / "train-00000-of-00002.parquet", [row])
    write_rows(folder / "train-00001-of-00002.parquet", [row | {"id": "2", "score": 1.0}])
    write_rows(folder / "test.parquet", [row | {"id": "3"}])
    put_record(folder, key=key)
    return folder


def test_artifacts_and_inputs_give_their_rows(refused: Refused, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "one")
    actual = list(read(ArtifactSource(type="artifact", path="one"), tmp_path))
    assert [item[0] for item in actual] == ["one/train: row 1", "one/train: row 2", "one/test: row 1"]
    assert [item[1]["id"] for item in actual if not isinstance(item, BadRecord)] == ["1", "2", "3"]
    assert "score" not in actual[0][1] and actual[1][1]["score"] == 1.0
    inputs = InputSource(type="input", index=1, split="test")
    assert [r["id"] for r in records(read(inputs, tmp_path, [tmp_path, folder]))] == ["3"]
    assert identity(inputs, tmp_path, [tmp_path, folder]) == {"input 1": "a" * 64}
    refused(lambda: list(read(inputs, tmp_path, [folder])))


def test_a_damaged_artifact_gives_no_rows(refused: Refused, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "one")
    flip_last_bit(folder / "test.parquet")
    refused(lambda: list(read(ArtifactSource(type="artifact", path="one"), tmp_path)))


def test_identity_of_an_artifact_is_its_key(refused: Refused, tmp_path: Path) -> None:
    artifact(tmp_path / "one")
    artifact_source = ArtifactSource(type="artifact", path="one")
    assert identity(artifact_source, tmp_path) == {"artifact": "a" * 64}
    (tmp_path / "one" / "record.json").write_text("{}")
    refused(identity, artifact_source, tmp_path)
    (tmp_path / "one" / "record.json").unlink()
    refused(identity, artifact_source, tmp_path)


def test_embedded_rows_follow_the_recipes_seed(tmp_path: Path) -> None:
    new_source = EmbeddedSource(type="embedded", size=20, families=["title"])
    assert records(read(new_source, tmp_path, seed=3)) == embedded.generate(20, 3, ["title"])
    assert records(read(new_source, tmp_path, seed=4)) != embedded.generate(20, 3, ["title"])


def test_a_chosen_format_comes_with_all_records(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"q{number}", "answer": "1 #### 2"}) for number in range(150)]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:]]))
    actual = source("a.jsonl")
    choice = choose_format(actual, read(actual, tmp_path), "instructions")
    assert (choice.format.form, choice.reason) == (
        "gsm8k",
        "gsm8k: 99 of 99 records have answer, question; that covers prompt_completion",
    )
    every = list(choice.records)
    assert len(every) == 151 and isinstance(every[1], BadRecord)
    named = source("a.jsonl", format="prompt_completion")
    assert choose_format(named, read(named, tmp_path)).format.form == "prompt_completion"
    renamed = source("a.jsonl", columns={"prompt": "question", "completion": "answer"})
    assert choose_format(renamed, read(renamed, tmp_path), "instructions").format.form == "prompt_completion"


def test_auto_on_nothing_it_can_read(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{broken\n")
    (tmp_path / "b.jsonl").write_text('{"color": "x"}\n')
    refused(lambda: choose_format(source("a.jsonl"), read(source("a.jsonl"), tmp_path)))
    refused(lambda: choose_format(source("b.jsonl"), read(source("b.jsonl"), tmp_path)))


def test_labels_are_names_or_origins_and_all_different(refused: Refused) -> None:
    artifact_source, same = source("a", "b"), source("a", "b")
    hubs = hub(config="main"), hub(files=["x.jsonl"], name="trees")
    assert labels([artifact_source, same, *hubs]) == ["a, b", "a, b (2)", "o/n main train", "trees"]
    assert labels([source("x"), source("y", name="x")]) == ["x (2)", "x"]
    refused(lambda: labels([source("x", name="x"), source("y", name="x")]))


class Holder(Config):
    """Something with a source in it."""

    source: HubSource


def test_the_hubs_dataset_is_not_its_name(refused: Refused) -> None:
    settings = {"type": "hub", "name": "openai/gsm8k", "revision": ZEROS}
    refused(validate, Holder, {"source": settings}, "r.yaml")
    refused(validate, Holder, {"source": {"type": "hub", "dataset": "o/n", "revision": "main"}}, "r.yaml")
