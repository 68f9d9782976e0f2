"""Files of every kind and packing give the same records, in bounded memory; what cannot be read is said."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.data.formats import reading
from align.data.formats.reading import read_file
from align.data.rows import BadRecord
from tests.support.refusals import Refused

RECORDS = [{"prompt": "é, 1", "completion": "a\nb"}, {"prompt": "2", "completion": "c"}]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n\n"
TABLE = 'prompt,completion\n"é, 1","a\nb"\n\n2,c\n'
TEXTS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": json.dumps(RECORDS, indent=1),
    ".csv": TABLE,
    ".tsv": TABLE.replace("1,", "1;").replace(",", "\t").replace(";", ",").replace("é\t", "é,"),
}


def zstd(data: bytes) -> bytes:
    """Two frames, as programs that append write them."""
    half = len(data) // 2
    codec = pa.Codec("zstd")
    return bytes(codec.compress(data[:half], asbytes=True)) + bytes(codec.compress(data[half:], asbytes=True))


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),  # whose window is small
    ".zst": zstd,
}


def good(path: Path) -> list[dict[str, object]]:
    actual = list(read_file(path))
    assert not any(isinstance(item, BadRecord) for item in actual), actual
    return [item[1] for item in actual if not isinstance(item, BadRecord)]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", TEXTS)
def test_every_kind_and_packing_gives_the_same_records(tmp_path: Path, kind: str, packed: str) -> None:
    for name, head in (("a", b""), ("with a byte order mark", b"\xef\xbb\xbf")):
        path = tmp_path / f"{name}{kind}{packed}"
        path.write_bytes(PACK[packed](head + TEXTS[kind].encode()))
        assert good(path) == RECORDS


def test_parquet_and_places(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert good(tmp_path / "a.parquet") == RECORDS
    for kind, places in ((".jsonl", [":1", ":2"]), (".csv", [":2", ":5"]), (".json", [": record 1", ": record 2"])):
        path = tmp_path / f"a{kind}"
        path.write_text(TEXTS[kind])
        assert [item[0] for item in read_file(path)] == [f"{path}{place}" for place in places]


def test_records_a_line_may_be_named_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(LINES)
    assert good(tmp_path / "a.json") == RECORDS
    long = [{"prompt": "x" * 100_000}, {"prompt": "y"}]
    (tmp_path / "b.json").write_text("\n".join(json.dumps(record) for record in long))
    assert good(tmp_path / "b.json") == long


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_text("\n")
        assert good(tmp_path / name) == []
    (tmp_path / "a.json").write_text("[]")
    assert good(tmp_path / "a.json") == []


def nested(levels: int) -> bytes:
    """A line with a record that holds so many lists inside one another."""
    return b'{"a": ' + b"[" * levels + b"]" * levels + b"}\n"


@pytest.mark.parametrize(
    ("name", "content", "reads", "where", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}\n', 2, "x.jsonl:2", "not valid JSON: Expecting value"),
        ("x.jsonl", b'{"a": 1}\n[1]\n{"a": 2}', 2, "x.jsonl:2", "holds list where a record was expected"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n{}', 2, "x.jsonl:2", "not UTF-8 text (byte 7 of the line)"),
        ("x.jsonl", b'{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude00"}', 1, "x.jsonl:1", "half of a surrogate pair"),
        ("x.jsonl", b"[" * 200_000 + b'\n{"a": 1}', 1, "x.jsonl:1", "nested more than 300 levels deep"),
        ("x.jsonl", nested(300) + nested(299), 1, "x.jsonl:1", "nested more than 300 levels deep"),
        ("x.jsonl", nested(950) + b'{"a": 1}', 1, "x.jsonl:1", "nested more than 300 levels deep"),
        ("x.json", b'{"a": ' + b"[" * 5000 + b'\n{"a": 1}', 1, "x.json:1", "nested more than 300 levels deep"),
        ("x.json", b'[{"a": 1}, 2, {"a": 3}]', 2, "x.json: record 2", "holds int where a record was expected"),
        (
            "x.json",
            b'[{"a": 1}, {"a": "\xff"}, {}]',
            1,
            "x.json: record 2",
            "invalid bytes in UTF8 string; nothing after",
        ),
        ("x.json", b'[{"a": 1}, {"a"', 1, "x.json: record 2", "premature EOF; nothing after it was read"),
        ("x.json", b"[" * 200_000, 0, "x.json: record 1", "nested more than 300 levels deep"),
        ("x.json", b'{\n"a": [{}]}', 0, "x.json", "holds one object; expected a list of records"),
        ("x.json", b'"text"', 0, "x.json", "holds neither a list nor an object"),
        ("x.parquet", b"nope", 0, "x.parquet: record 1", "not a readable Parquet file"),
        ("x.csv", b"a,b\n1,2,3\n4,5\n", 1, "x.csv:2", "3 cells, more than the header's 2"),
        ("x.csv", b'a,b\n"1"x,2\n4,5\n', 1, "x.csv:2", "not valid CSV"),
        ("x.csv", b"a,b\n1,\xff\n4,5\n", 1, "x.csv:2", "not UTF-8 text"),
        ("x.csv", b'a\n"' + b"x" * 2000, 0, "x.csv:2", "field larger than field limit"),
    ],
)
def test_a_bad_record_is_said_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, reads: int, where: str, message: str
) -> None:
    monkeypatch.setattr(reading, "LONGEST_CELL", 1000)
    (tmp_path / name).write_bytes(content)
    actual = list(read_file(tmp_path / name))
    bad = [item for item in actual if isinstance(item, BadRecord)]
    assert len(actual) == reads + 1 == reads + len(bad)
    assert bad[0].where == str(tmp_path / where) and message in bad[0].problem
    assert bad[0].message == str(bad[0]) == f"{bad[0].where}: {bad[0].problem}"


def test_two_columns_of_one_name_are_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b,a,,\n1,2,3,,\n")
    refused(lambda: list(read_file(tmp_path / "x.csv")))


@pytest.mark.parametrize(
    ("kind", "packed"),
    [(".jsonl", ".gz"), (".jsonl", ".bz2"), (".jsonl", ".xz"), (".jsonl", ".zst"), (".csv", ".gz"), (".json", ".gz")],
)
def test_what_was_read_of_a_file_that_ends_early_counts(tmp_path: Path, kind: str, packed: str) -> None:
    import random

    # Random text, so that what is left of the packed file has records of its own.
    draw = random.Random(1)
    texts = ["".join(draw.choices("abcdefghij", k=200)) for _ in range(5000)]
    content = {
        ".jsonl": "\n".join(json.dumps({"a": text}) for text in texts),
        ".csv": "a\n" + "\n".join(texts),
        ".json": json.dumps([{"a": text} for text in texts]),
    }[kind]
    path = tmp_path / f"a{kind}{packed}"
    data = (
        PACK[packed](content.encode())
        if packed != ".zst"
        else pa.Codec("zstd").compress(content.encode(), asbytes=True)
    )
    path.write_bytes(data[: len(data) * 3 // 4])
    *records, last = read_file(path)
    assert [item[1]["a"] for item in records if not isinstance(item, BadRecord)] == texts[: len(records)]
    assert isinstance(last, BadRecord) and "from here on not a complete" in last.problem
    if packed != ".bz2":  # whose blocks are of 900 kB
        assert len(records) > 1000 and last.where == records[-1][0]


def test_a_file_that_is_not_packed_as_its_name_says(tmp_path: Path) -> None:
    for packed in (".gz", ".bz2", ".xz", ".zst"):
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(b'{"a": 1}\n')
        (bad,) = read_file(path)
        assert isinstance(bad, BadRecord) and bad.where == str(path) and "not a complete" in bad.problem


def test_a_file_that_cannot_be_opened(refused: Refused, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.jsonl.zst"):
        refused(list, read_file(tmp_path / name))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl.xz", "a.csv.zst", "a.parquet"])
def test_memory_holds_a_few_records_of_a_large_file(tmp_path: Path, name: str) -> None:
    records = [{"a": f"{number} " * 300} for number in range(8000)]  # 12 MB
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=500)
    else:
        text = {
            "json": json.dumps(records),
            "jsonl": "\n".join(map(json.dumps, records)),
            "csv": "a\n" + "\n".join(record["a"] for record in records),
        }[name.split(".")[1]]
        path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](text.encode()))
    tracemalloc.start()
    count = sum(1 for _ in read_file(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000 and peak < 3e6


def test_bad_records_travel_between_processes() -> None:
    bad = pickle.loads(pickle.dumps(BadRecord("f:1", "wrong")))
    assert (bad.where, bad.problem, str(bad)) == ("f:1", "wrong", "f:1: wrong")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_files_of_other_encodings_are_read(tmp_path: Path, encoding: str, kind: str) -> None:
    path = tmp_path / f"x{kind}"
    path.write_bytes(TEXTS[kind].encode(encoding))
    assert [item[1] for item in read_file(path, encoding=encoding)] == RECORDS  # type: ignore[index]
    packed = tmp_path / f"y{kind}.gz"
    packed.write_bytes(gzip.compress(TEXTS[kind].encode(encoding)))
    assert [item[1] for item in read_file(packed, encoding=encoding)] == RECORDS  # type: ignore[index]


def test_wrong_encoding_is_named(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES.encode("latin-1"))
    assert any(isinstance(item, BadRecord) and "name its encoding" in item.problem for item in read_file(path))
    path.write_bytes(b"\x81")
    refused(lambda: list(read_file(path, encoding="cp1252")))


def test_delimiter_of_a_table_is_a_setting(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('prompt;completion\n"é; 1";"a\nb"\n2;c\n', encoding="utf-8")
    expected = [{"prompt": "é; 1", "completion": "a\nb"}, {"prompt": "2", "completion": "c"}]
    assert [item[1] for item in read_file(path, delimiter=";")] == expected  # type: ignore[index]
    refused(lambda: list(read_file(path)))
    (tmp_path / "x.json").write_text("[]")
    refused(lambda: list(read_file(tmp_path / "x.json", delimiter=";")))
