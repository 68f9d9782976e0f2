"""Reading files, their identities, and what unreadable ones and an unreachable Hub give."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.data.source_configs import FilesSource, HubSource
from align.data.sources import find_files, identity, read_files, read_hub
from align.errors import UserError

RECORDS = [{"prompt": "é, 1", "completion": "a\nb"}, {"prompt": "2", "completion": "c"}]


def source(*paths: str) -> FilesSource:
    return FilesSource(type="files", paths=list(paths), format="prompt_completion")


def write_all(folder: Path) -> None:
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    (folder / "a.jsonl").write_text(lines + "\n\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    (folder / "c.json").write_text(json.dumps(RECORDS))
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "d.parquet")
    (folder / "e.csv").write_text('prompt,completion\n"é, 1","a\nb"\n2,c\n')


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    write_all(tmp_path)
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet", "e.csv"):
        assert [record for _, record in read_files(source(name), tmp_path)] == RECORDS, name
    assert [where for where, _ in read_files(source("a.jsonl"), tmp_path)][1] == f"{tmp_path / 'a.jsonl'}:2"
    assert len(list(read_files(source("*.json*"), tmp_path))) == 6
    assert len(find_files(["*.jsonl", "a.*"], tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"x.jsonl:2: not valid JSON"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', r"x.jsonl:2: holds list where a record"),
        ("x.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("x.jsonl.gz", b"plain", "not a complete gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-9], "not a complete gzip file"),
        ("x.json", b'{"a": 1}\n{"a": 2}', r"x.json:2: not valid JSON: Extra data. One record a line\? Name it .jsonl"),
        ("x.json", b'{"a": 1}', "holds dict; expected a list"),
        ("x.parquet", b"nope", "not a readable Parquet"),
        ("x.csv", b"a,b\n1,2,3\n", r"x.csv:2: more cells than the header's 2"),
        ("x.csv", b'a,b\n"1"x,2\n', r"x.csv:2: not valid CSV"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_files(source(name), tmp_path))


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    write_all(tmp_path)
    with pytest.raises(UserError, match=r"no file matches 'a.jsonll' .*Did you mean 'a.jsonl'"):
        find_files(["a.jsonll"], tmp_path)
    (tmp_path / "f.txt").write_text("x")
    with pytest.raises(UserError, match=r"f.txt: unknown kind of file"):
        find_files(["f.txt"], tmp_path)


def test_identity_is_the_content(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("{}\n")
    assert identity(source("one/a.jsonl"), tmp_path) == identity(source("two/a.jsonl"), tmp_path)
    assert len(identity(source("*/a.jsonl"), tmp_path)) == 2
    before = identity(source("one/a.jsonl"), tmp_path)
    (tmp_path / "one" / "a.jsonl").write_text("{} \n")
    assert identity(source("one/a.jsonl"), tmp_path) != before


def test_unreachable_hub_names_the_dataset_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*arguments: object, **options: object) -> None:
        assert options["revision"] == "0" * 40
        raise ConnectionError("Couldn't reach 'o/n' on the Hub (LocalEntryNotFoundError)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    hub = HubSource(type="hub", dataset="o/n", revision="0" * 40, format="messages")
    with pytest.raises(
        UserError, match=r"the Hub dataset 'o/n' at 000000000000 could not be read: Couldn't reach"
    ) as caught:
        list(read_hub(hub))
    assert "stages.data.files=" in str(caught.value) and "more" not in str(caught.value)
