"""The journal of an update: what is in it is read back after any kill, and nothing else."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.environments.journal import Journal, Position

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1, max_size=5)


def test_an_entry_is_there_at_once_and_after_another_opening(tmp_path: Path) -> None:
    path = tmp_path / "episodes" / "update-1.jsonl"
    journal = Journal(path)
    journal.put("call", 3, 1, 2, entry={"text": "<|im_end|>\ud800", "numbers": (1, 2.5)})
    journal.put("reset", 3, entry={"messages": None})
    for opened in (journal, Journal(path)):
        assert opened.get("call", 3, 1, 2) == {"text": "<|im_end|>\ud800", "numbers": [1, 2.5]}
        assert opened.get("call", 3, 1, 1) is None
        assert [position.kind for position, _ in opened.entries(3)] == ["call", "reset"]
        assert opened.entries(4) == [] and len(opened) == 2


def test_an_entry_is_written_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.put("reset", 0, entry={})
    with pytest.raises(ValueError, match="already"):
        journal.put("reset", 0, entry={})


def test_what_json_cannot_hold_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with pytest.raises(TypeError):
        journal.put("reset", 0, entry={"a": object()})
    journal.put("reset", 0, entry={"a": 1})
    assert Journal(tmp_path / "journal").get("reset", 0) == {"a": 1}


def test_a_journal_of_another_update_is_dropped(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", key="first").put("reset", 0, entry={"a": 1})
    assert Journal(tmp_path / "journal", key="first").get("reset", 0) == {"a": 1}
    assert len(Journal(tmp_path / "journal", key="second")) == 0
    assert len(Journal(tmp_path / "journal", key="first")) == 0


def test_a_journal_is_deleted_with_its_update(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.put("reset", 0, entry={})
    journal.drop()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="closed"):
        journal.put("reset", 1, entry={})


@pytest.mark.parametrize("step", ["pwrite", "fsync"])
def test_a_line_that_a_thread_is_writing_is_whole_before_the_journal_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    journal = Journal(tmp_path / "journal")
    begun, release, call = threading.Event(), threading.Event(), getattr(os, step)

    def wait_first(*values: Any) -> Any:
        begun.set()
        assert release.wait(20)
        return call(*values)

    monkeypatch.setattr(os, step, wait_first)
    failures: list[Exception] = []

    def write() -> None:
        try:
            journal.put("user", 0, 1, entry={"text": "A lamp."})
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write), threading.Thread(target=journal.close)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    threads[1].join(0.1)
    release.set()
    for thread in threads:
        thread.join(20)
    assert not failures
    assert Journal(tmp_path / "journal").get("user", 0, 1) == {"text": "A lamp."}


def test_many_threads_write_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")

    def write(episode: int) -> None:
        for turn in range(5):
            journal.put("turn", episode, turn, entry={"token_ids": [episode, turn]})

    threads = [threading.Thread(target=write, args=(episode,)) for episode in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Journal(tmp_path / "journal")
    for episode in range(8):
        assert [entry["token_ids"] for _, entry in again.entries(episode)] == [[episode, turn] for turn in range(5)]


@given(ENTRIES, st.data())
@settings(max_examples=25, deadline=None)
def test_a_journal_that_is_torn_at_any_byte_has_the_entries_before_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("torn") / "journal"
    journal = Journal(path, key="k")
    ends = [path.stat().st_size]
    for index, entry in enumerate(entries):
        journal.put("turn", 0, index, entry=entry)
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    there = sum(end <= cut for end in ends[1:]) if cut >= ends[0] else 0
    torn = Journal(path, key="k")
    assert [entry for _, entry in torn.entries(0)] == entries[:there]
    for index in range(there, len(entries)):
        torn.put("turn", 0, index, entry=entries[index])
    assert path.read_bytes() == whole
    assert [entry for _, entry in Journal(path, key="k").entries(0)] == entries


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_entries_that_were_written_together_are_there_together_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("together") / "journal"
    Journal(path).put_all([(Position("turn", episode), {"token_ids": [episode]}) for episode in range(4)])
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    assert len(Journal(path)) == (4 if path.read_bytes() == whole else 0)


@pytest.mark.parametrize("changed", range(3))
def test_what_follows_a_damaged_line_is_dropped(tmp_path: Path, changed: int) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    for index in range(3):
        journal.put("turn", 0, index, entry={"token_ids": [10 + index]})
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1 + changed] = lines[1 + changed].replace(b"[1", b"[7")
    path.write_bytes(b"".join(lines))
    assert [entry["token_ids"] for _, entry in Journal(path).entries(0)] == [[10 + index] for index in range(changed)]


def test_what_is_dropped_leaves_the_file_with_the_next_entry(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.put("turn", 0, 0, entry={"token_ids": list(range(100))})
    header = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(path.read_bytes()[:-1])
    Journal(path).put("turn", 0, 0, entry={"token_ids": [7]})
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[0] == header and len(lines) == 2 and b"[7]" in lines[1]
