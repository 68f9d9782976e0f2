"""Tables of stored rollouts: every page is what plain Python computes from the same rows."""

import json
import math
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.errors import UserError
from align.store.rollout_writer import RolloutFiles, merge, write_file
from align.store.rollouts import ROLLOUTS, SCHEMA, make_table
from align.studio.rollouts.details import RolloutDetails
from align.studio.rollouts.filters import RolloutFilter, TableQuery, split_words
from align.studio.rollouts.parquet_reader import ParquetReader, Rows
from align.studio.rollouts.queries import Page, RolloutTable, row_id
from tests.support.stored_rollouts import write_rollouts

HOSTILE = [
    "' OR true --",
    '" OR 1=1; --',
    "'; DROP TABLE rollouts; --",
    "$files",
    "%",
    ".*",
    "(",
    "\\",
    "{FROM}",
    "/etc/passwd",
    "<script>alert(1)</script>",
    "\u202e\x00é",
    ") UNION SELECT * FROM read_text('/etc/passwd') --",
]


def write(folder: Path, rows: list[dict[str, Any]], has_old_names: bool = False) -> None:
    """Write a file for each update; ``has_old_names`` names them as earlier versions did."""
    for update in sorted({row["update"] for row in rows}):
        table = make_table([row for row in rows if row["update"] == update])
        if has_old_names:
            write_rollouts(table, folder / f"{update:06d}.parquet", {})
        else:
            write_file(folder, [table], {})


def open_table(folder: Path) -> RolloutTable:
    return RolloutTable(ParquetReader(folder), lambda: folder)


def row(update: int, index: int, **columns: Any) -> dict[str, Any]:
    return {
        "update": update,
        "round": 0,
        "group": index // 2,
        "index": index,
        "prompt_id": f"p{index // 2}",
        "prompt": [{"role": "user", "content": f"question {index // 2}"}],
        "response": f"answer {update} {index}",
        "score": float(index),
        "tokens": 2,
        "finished": True,
        "learned": True,
        "kl": 0.5,
        **columns,
    }


def read_all(table: RolloutTable, **query: Any) -> list[dict[str, Any]]:
    """Return the rows of a search, request by request, as the page asks for them."""
    rows: list[dict[str, Any]] = []
    after = ""
    while True:
        page = table.page(TableQuery(**query, after=after))
        rows += page.rows
        after = page.next
        if not after:
            return rows


# ---- every filter and order, against plain Python


def float32(value: float) -> float:
    return float(np.float32(value))


floats = st.one_of(st.none(), st.floats(width=32), st.sampled_from([0.0, float32(0.1), -1.0, math.nan, math.inf]))
texts = st.one_of(st.text(st.sampled_from('aBß\n"\\%.é <>'), max_size=12), st.sampled_from(HOSTILE))
names = st.sampled_from(["math", "style", "a'b", '"', "$part"])
stored_rows = st.lists(
    st.fixed_dictionaries(
        {
            "update": st.integers(1, 3),
            "prompt_id": st.one_of(st.sampled_from(["p", "q"]), st.sampled_from(HOSTILE)),
            "prompt": texts.map(lambda text: [{"role": "user", "content": text}]),
            "response": texts,
            "score": floats,
            "kl": floats,
            "scores": st.dictionaries(names, st.floats(width=32), max_size=2),
            "reasons": st.dictionaries(names, st.sampled_from(["timed_out", "unequal", *HOSTILE]), max_size=2),
            "tokens": st.integers(0, 5),
            "finished": st.booleans(),
            "learned": st.booleans(),
        }
    ),
    max_size=12,
)
bounds = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.1, 1.0]))
words = st.one_of(st.just(""), texts)
filters = st.fixed_dictionaries(
    {},
    optional={
        "first_update": st.integers(0, 3),
        "last_update": st.integers(0, 3),
        "prompt_id": st.one_of(st.sampled_from(["", "p"]), st.sampled_from(HOSTILE)),
        "part": st.one_of(st.just(""), names, st.sampled_from(HOSTILE)),
        "min_score": bounds,
        "max_score": bounds,
        "min_kl": bounds,
        "max_kl": bounds,
        "min_tokens": st.integers(0, 5),
        "max_tokens": st.integers(0, 5),
        "reason": st.one_of(st.sampled_from(["", "timed_out"]), st.sampled_from(HOSTILE)),
        "stop": st.sampled_from(["", *HOSTILE]),
        "split": st.sampled_from(["", *HOSTILE]),
        "finished": st.booleans(),
        "learned": st.booleans(),
        "response_words": words,
        "prompt_words": words,
    },
)
orders = st.fixed_dictionaries(
    {
        "sort": st.sampled_from(["update", "score", "tokens", "kl", "part", "gold", "turns", "thought_tokens"]),
        "sort_part": st.one_of(names, st.sampled_from(HOSTILE)),
        "descending": st.booleans(),
        "limit": st.integers(1, 5),
        "offset": st.integers(0, 3),
    }
)


def meets(row: dict[str, Any], query: TableQuery) -> bool:
    """Return True if a row meets the conditions, computed as plainly as possible."""

    def within(value: Any, low: Any, high: Any) -> bool:
        if low is None and high is None:
            return True
        if value is None or math.isnan(value):
            return False
        return (low is None or value >= float32(low)) and (high is None or value <= float32(high))

    score = row["scores"].get(query.part) if query.part else row["score"]
    has_words = all(
        re.search(re.escape(word), text, re.IGNORECASE)
        for text, searched in (
            (row["response"], query.response_words),
            (row["prompt"][0]["content"], query.prompt_words),
        )
        for word in split_words(searched)
    )
    return all(
        (
            query.first_update is None or row["update"] >= query.first_update,
            query.last_update is None or row["update"] <= query.last_update,
            query.prompt_id in ("", row["prompt_id"]),
            not query.stop,
            not query.split,
            within(score, query.min_score, query.max_score),
            within(row["kl"], query.min_kl, query.max_kl),
            within(row["tokens"], query.min_tokens, query.max_tokens),
            not query.reason or query.reason in row["reasons"].values(),
            query.finished in (None, row["finished"]),
            query.learned in (None, row["learned"]),
            has_words,
        )
    )


def in_order(rows: list[dict[str, Any]], query: TableQuery) -> list[str]:
    """Return the identities of rows in the order of a query."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        value = row["scores"].get(query.sort_part) if query.sort == "part" else row.get(query.sort)
        is_missing = value is None or math.isnan(value)
        number = 0.0 if is_missing else value
        return is_missing, -number if query.descending else number, -row["update"], row["group"], row["index"]

    return [row_id({"split": None, **row}) for row in sorted(rows, key=key)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored=stored_rows, conditions=filters, order=orders, has_old_names=st.booleans())
def test_pages_equal_those_of_plain_python(
    tmp_path_factory: pytest.TempPathFactory, stored: Any, conditions: Any, order: Any, has_old_names: bool
) -> None:
    folder = tmp_path_factory.mktemp("rollouts")
    rows = [row(each["update"], index) | each for index, each in enumerate(stored)]
    write(folder, rows, has_old_names)
    query = TableQuery(**conditions, **order)
    expected = in_order([each for each in rows if meets(each, query)], query)
    page = open_table(folder).page(query)
    if not query.has_words:
        assert [each["id"] for each in page.rows] == expected[query.offset : query.offset + query.limit]
        assert page.matches == len(expected)
    elif query.by_update:
        everything = read_all(open_table(folder), **conditions, **order)
        assert [each["id"] for each in everything] == expected
    else:
        assert [each["id"] for each in page.rows] == expected[: query.limit]
        assert page.matches == len(expected)
    assert page.total == len(rows)
    json.dumps(page.rows, allow_nan=False)


# ---- searches for words


def test_search_returns_in_time_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [row(update, index) for update in range(1, 6) for index in range(4)])
    monkeypatch.setattr("align.studio.rollouts.queries.SEARCH_BYTES", 1)
    monkeypatch.setattr("align.studio.rollouts.queries.SECONDS", -1.0)
    table = open_table(tmp_path)
    first = table.page(TableQuery(response_words="answer", limit=3))
    # The page is full after three of the newest file's four rows.
    assert [each["id"] for each in first.rows] == ["5--0-0-0", "5--0-0-1", "5--0-1-2"]
    assert (first.searched, first.matches, first.total, first.next) == (4, 4, 20, "5:3")
    second = table.page(TableQuery(response_words="answer", limit=3, after=first.next))
    assert [each["id"] for each in second.rows] == ["5--0-1-3"]
    assert (second.searched, second.matches, second.next) == (0, 0, "4:0")
    best = table.page(TableQuery(response_words="answer", limit=2, sort="score"))
    assert [each["key"] for each in best.rows] == [3.0, 2.0]
    assert (best.searched, best.next) == (4, "4:0")
    assert len(read_all(table, response_words="answer", limit=3)) == 20


@pytest.mark.parametrize("has_old_names", [True, False])
def test_search_continues_after_its_file_is_deleted(tmp_path: Path, has_old_names: bool) -> None:
    write(tmp_path, [row(update, 0) for update in (1, 2, 3)], has_old_names)
    name = sorted(tmp_path.glob("*.parquet"))[1].name
    (tmp_path / name).unlink()
    place = name if has_old_names else "2"
    page = open_table(tmp_path).page(TableQuery(response_words="answer", after=f"{place}:1"))
    assert [each["update"] for each in page.rows] == [1]


@pytest.mark.parametrize("order", [{}, {"descending": False}, {"sort": "score"}])
def test_search_continues_in_the_file_of_a_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: dict[str, Any]
) -> None:
    monkeypatch.setattr("align.studio.rollouts.queries.SEARCH_BYTES", 1)
    monkeypatch.setattr("align.studio.rollouts.queries.SECONDS", -1.0)
    files = RolloutFiles(tmp_path, 10**9, {}, print)
    table = open_table(tmp_path / ROLLOUTS)
    after = ""
    ids: list[str] = []
    update = 6
    for number in range(1, update + 1):
        files.write(make_table([row(number, index) for index in range(4)]))
    # A search by score continues once before everything is in one file.
    while True:
        page = table.page(TableQuery(response_words="answer", limit=3, last_update=6, after=after, **order))
        ids += [each["id"] for each in page.rows]
        if not (after := page.next):
            break
        update += 1
        files.write(make_table([row(update, index) for index in range(4)]))
    assert update >= 8 and len(set(ids)) == len(ids)
    # Another order than by update has the best rows of each request only.
    assert len(ids) == (9 if "sort" in order else 24)


def test_text_of_a_row_is_cut_around_the_word(tmp_path: Path) -> None:
    text = "x" * 1000 + " needle " + "y" * 1000
    write(tmp_path, [row(1, 0, response=text)])
    shown = open_table(tmp_path).page(TableQuery(response_words="NEEDLE")).rows[0]["response"]
    assert "needle" in shown
    assert len(shown) < 300


# ---- a running stage


def test_pages_of_a_running_stage_are_complete(tmp_path: Path) -> None:
    """Files are added, merged and deleted while they are read: an update is there entirely or not."""
    root = tmp_path / "store"
    finished = tmp_path / "store" / "finished"
    is_published, is_done = threading.Event(), threading.Event()

    def train() -> None:
        files = RolloutFiles(root, 60_000, {}, lambda _: None)
        for update in range(1, 80):
            if update == 40:
                files.rewind(30)
            files.write(make_table([row(update, index, response="answer " + "z" * 200) for index in range(6)]))
            time.sleep(0.02)  # an update of a real run needs seconds
        merge(root / ROLLOUTS, finished / ROLLOUTS, print)
        is_published.set()  # by a rename; then the folder with the checkpoints is deleted
        for path in (root / ROLLOUTS).glob("*.parquet"):
            path.unlink()
        (root / ROLLOUTS).rmdir()
        is_done.set()

    def locate() -> Path:
        return (finished if is_published.is_set() else root) / ROLLOUTS

    reader = ParquetReader(root)
    table = RolloutTable(reader, locate)
    details = RolloutDetails(table)
    thread = threading.Thread(target=train)
    thread.start()
    pages: list[Page] = []
    while not is_done.is_set() or not pages:
        page = table.page(TableQuery(limit=12, response_words="answer" if len(pages) % 2 else ""))
        if page.rows:
            pages.append(page)
            details.means(RolloutFilter())
    thread.join()
    for page in pages:
        newest = page.rows[0]["update"]
        assert [each["update"] for each in page.rows[:6]] == [newest] * 6
        assert len({each["id"] for each in page.rows}) == len(page.rows)
    last = table.page(TableQuery())
    assert last.rows[0]["update"] == 79


def test_updates_between_statements_repeat_no_query(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path, 10**9, {}, print)
    update = 0
    statements = 0

    def write_update() -> None:
        nonlocal update
        update += 1
        files.write(make_table([row(update, index) for index in range(4)]))

    class Reader(ParquetReader):
        def rows(self, sql: str, parameters: Any) -> Rows:
            nonlocal statements
            statements += 1
            write_update()
            return super().rows(sql, parameters)

    write_update()
    table = RolloutTable(Reader(tmp_path), lambda: tmp_path / ROLLOUTS)
    for _ in range(8):
        stored = update
        page = table.page(TableQuery(sort="score", limit=2))
        assert (page.total, len(page.rows)) == (4 * stored, 2)
    assert statements == 3 * 8


def test_a_file_shortened_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    class Reader(ParquetReader):
        is_first = True

        def rows(self, sql: str, parameters: Any) -> Rows:
            result = super().rows(sql, parameters)
            if "hits" in sql and self.is_first:
                self.is_first = False
                write_rollouts(make_table([row(1, 0)]), tmp_path / "000001.parquet", {})
            return result

    write(tmp_path, [row(1, index) for index in range(6)], has_old_names=True)
    with pytest.raises(UserError, match="changed while it was read"):
        RolloutTable(Reader(tmp_path), lambda: tmp_path).page(TableQuery())


def test_empty_files_and_folders_have_no_rows(tmp_path: Path) -> None:
    table = open_table(tmp_path)
    assert table.page(TableQuery()) == Page([], 0, 0, 0)
    assert table.page(TableQuery(response_words="a")) == Page([], 0, 0, 0)
    write_rollouts(SCHEMA.empty_table(), tmp_path / "train-0000000.parquet", {})
    assert table.page(TableQuery(response_words="a")) == Page([], 0, 0, 0)
    assert RolloutDetails(table).facets()["rows"] == 0


def test_damaged_file_is_an_error_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "000001.parquet").write_bytes(b"PAR1 no such file")
    with pytest.raises(UserError, match=r"000001\.parquet"):
        open_table(tmp_path).page(TableQuery())


# ---- what the database must not do


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM read_parquet('{folder}/../other/000001.parquet')",
        "SELECT * FROM read_parquet('https://example.com/a.parquet')",
        "SELECT * FROM '/etc/hostname'",
        "COPY (SELECT 1) TO '{folder}/../written.csv'",
        "ATTACH '{folder}/../written.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET memory_limit = '100GB'",
        "SELECT * FROM folder",
    ],
)
def test_database_refuses_other_files_and_hosts(tmp_path: Path, sql: str) -> None:
    import duckdb

    folder = tmp_path / "rollouts"
    write(folder, [row(1, 0)])
    write(tmp_path / "other", [row(1, 0)], has_old_names=True)
    reader = ParquetReader(folder)
    with pytest.raises((duckdb.PermissionException, duckdb.InvalidInputException, duckdb.CatalogException)):
        reader.rows(sql.replace("{folder}", str(folder)), {})
    assert not list(tmp_path.glob("written*"))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_parameters_select_equal_text_only(tmp_path: Path, text: str) -> None:
    write(tmp_path, [row(1, 0), row(1, 1, prompt_id=text, scores={text: 1.0}, reasons={"math": text}, stop=text)])
    table = open_table(tmp_path)
    details = RolloutDetails(table)
    for query in (
        {"prompt_id": text},
        {"reason": text},
        {"stop": text},
        {"part": text, "min_score": 0.5},
    ):
        page = table.page(TableQuery(**query))
        assert [each["id"] for each in page.rows] == ["1--0-0-1"], query
    assert table.page(TableQuery(split=text)).rows == []
    assert table.page(TableQuery(after=text)).matches == 2
    assert table.page(TableQuery(sort="part", sort_part=text)).rows[0]["key"] == 1.0
    assert [point["parts"] for point in details.means(RolloutFilter(), [text])] == [{text: 1.0}]
    assert details.prompt(text)["answers"][0]["id"] == "1--0-0-1"
    assert details.row(text) is None
    assert text in details.facets()["reasons"]
