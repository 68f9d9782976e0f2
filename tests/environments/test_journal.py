"""The journal of an update, and environments that do nothing twice because of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.environments.environment import EnvironmentSource
from align.environments.journal import CallResult, Journal, JournaledEnvironment, Position
from align.environments.results import EnvironmentFailed, Scores, Step
from align.environments.worker_pool import EnvironmentPool
from tests.support.environments.classes import CALLS
from tests.support.environments.opened import open_class, open_tools

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
def test_close_waits_for_a_line_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
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
def test_torn_journal_keeps_earlier_entries(
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
def test_entries_of_one_line_are_all_or_none(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
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


ROW = {"goal": 6}
Open = Callable[..., JournaledEnvironment]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the environment of an episode in a new pool, as another process would, with the journal on the disk."""
    pools: list[EnvironmentPool] = []

    def open_episode(
        source: EnvironmentSource, row: dict[str, Any] = ROW, episode: int = 0, **options: Any
    ) -> JournaledEnvironment:
        pools.append(EnvironmentPool(source, **({"workers": 2, "tool_seconds": 20.0} | options)))
        return JournaledEnvironment(pools[-1], Journal(tmp_path / "journal"), episode, row)

    yield open_episode
    for pool in pools:
        pool.close()


def play(environment: JournaledEnvironment, calls: int) -> list[Any]:
    """Begin an episode and call a tool in each turn; returns what came back."""
    results: list[Any] = [environment.reset().result(20)]
    for turn in range(calls):
        results.append(environment.call(turn, 0, "add", {"number": turn + 1}).result(20).text)
    return results


@pytest.mark.parametrize("name", ["Counter", "Saved"])
def test_what_the_journal_has_is_not_done_again(opened: Open, name: str) -> None:
    before = play(opened(open_class(name)), 3)
    CALLS.clear()
    again = opened(open_class(name))
    assert play(again, 3) == before
    assert CALLS == [] and not again._pool.is_open(0)
    score = again.score([]).result(20)
    assert score == Scores(1.0, {"right": 1.0, "close": 0.0})
    # A counter that cannot be saved repeats its three calls; one that can comes from its state.
    repeated = [] if name == "Saved" else ["add"] * 3
    assert repeated == CALLS
    last = opened(open_class(name))
    assert last.score([]).result(20) == score and not last._pool.is_open(0)


@pytest.mark.parametrize("name", ["Counter", "Saved"])
@pytest.mark.parametrize("calls", range(4))
def test_an_episode_goes_on_after_any_call(opened: Open, name: str, calls: int) -> None:
    play(opened(open_class(name)), calls)
    assert play(opened(open_class(name)), 3)[1:] == ["The count is 1.", "The count is 3.", "The count is 6."]


def test_results_are_journaled_before_they_are_used(opened: Open, tmp_path: Path) -> None:
    environment = opened(open_class("Saved"))
    play(environment, 1)
    result = environment.call(1, 0, "add", {"number": 5}).result(20)
    entry = Journal(tmp_path / "journal").get("call", 0, 1, 0)
    assert entry == {
        "name": "add", "arguments": {"number": 5}, "text": "The count is 6.", "error": "", "seconds": result.seconds,
        "state": {"goal": 6, "count": 6},
    }  # fmt: skip


def test_calls_of_a_turn_run_in_order(opened: Open) -> None:
    environment = opened(open_class("Counter"))
    environment.reset()
    results = [environment.call(0, index, "wait_and_add", {"number": 1}) for index in range(3)]
    score = environment.score([])
    assert [result.result(20).text for result in results] == ["1", "2", "3"]
    assert score.result(20).parts["close"] == -0.3


def test_a_game_is_played_again(opened: Open) -> None:
    environment = opened(open_class("Game"), {"goal": 3})
    assert environment.reset().result(20) is None
    assert environment.step(0, "2").result(20) == Step([{"role": "user", "content": "Not 2."}])
    again = opened(open_class("Game"), {"goal": 3})
    assert again.step(0, "2").result(20) == Step([{"role": "user", "content": "Not 2."}])
    assert again.step(1, "3").result(20) == Step([], True)
    assert again.score([{"role": "assistant", "content": "3"}]).result(20).turns == [0.0, 1.0]


def test_errors_are_told_and_come_back_as_they_were(opened: Open) -> None:
    calls = [
        ("divide", {"first": 1, "second": 0}, "ZeroDivisionError: division by zero", "raised"),
        ("divide", {"first": 1}, "divide needs the argument 'second'.", "arguments"),
        ("divid", {}, "there is no tool 'divid'. Did you mean 'divide'?", "arguments"),
    ]
    for _ in range(2):
        environment = opened(open_class("Troubled"))
        environment.reset()
        for turn, (name, arguments, text, kind) in enumerate(calls):
            result = environment.call(turn, 0, name, arguments).result(20)
            assert (result.text, result.error) == (text, kind)
        with pytest.raises(EnvironmentFailed, match="^the sandbox is gone$"):
            environment.call(3, 0, "give_up", {}).result(20)


def test_half_a_character_of_an_error_is_replaced(opened: Open) -> None:
    environment = opened(open_class("Garbled"))
    environment.reset()
    assert environment.call(0, 0, "shout", {}).result(20).text == "bad \ufffd"
    with pytest.raises(EnvironmentFailed, match="^bad \ufffd$"):
        opened(open_class("Garbled"), {"fails": True}, episode=1).reset().result(20)


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize("name", ["Stuck", "SavedStuck"])
def test_an_instance_comes_back_after_a_call_that_hangs(opened: Open, name: str, isolation: Any) -> None:
    environment = opened(open_class(name), isolation=isolation)
    environment.reset()
    assert environment.call(0, 0, "add", {"number": 2}).result(20).text == "The count is 2."
    environment._pool.tool_seconds = 0.3
    stuck = environment.call(1, 0, "hang", {})
    environment._pool.tool_seconds = 20.0
    queued = environment.call(1, 1, "add", {"number": 4})
    assert stuck.result(20) == CallResult("hang did not answer within 0.3 seconds.", "timeout", stuck.result().seconds)
    # The call that hung is not repeated.
    assert queued.result(20).text == "The count is 6."
    assert environment.score([]).result(20).total == 1.0


def test_a_process_that_dies_fails_its_episode_for_good(opened: Open) -> None:
    for _ in range(2):
        environment = opened(open_class("Troubled"), isolation="process")
        environment.reset()
        with pytest.raises(EnvironmentFailed, match="died"):
            environment.call(0, 0, "die", {}).result(20)


def test_an_action_with_another_result_is_counted_and_told(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    play(opened(open_class("Clock")), 2)
    again = opened(open_class("Clock"))
    play(again, 3)
    assert again.differing == 2
    assert "2 repeated actions of the environment had another result than before" in caplog.text


def test_functions_are_called_once(opened: Open) -> None:
    first = opened(open_tools("double"), {"goal": "3"})
    first.reset()
    assert first.call(0, 0, "double", {"number": 2}).result(20).text == "4"
    again = opened(open_tools("double"), {"goal": "3"})
    assert again.call(0, 0, "double", {"number": 2}).result(20).text == "4"
    assert again.score([{"role": "assistant", "content": "3"}]).result(20).total == 1.0
    assert again.differing == 0


def test_a_disk_that_takes_nothing_is_an_error_of_the_request(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = opened(open_class("Counter"))
    environment.reset().result(20)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        environment.call(0, 0, "add", {"number": 1}).result(20)


def test_failed_restore_fails_the_episode(opened: Open) -> None:
    play(opened(open_class("Counter")), 1)
    environment = opened(open_class("Counter"), {})
    with pytest.raises(EnvironmentFailed, match="could not be restored: Counter.reset raised KeyError"):
        environment.call(1, 0, "add", {"number": 1}).result(20)


def test_states_that_json_cannot_hold_fail_the_episode(opened: Open) -> None:
    with pytest.raises(EnvironmentFailed, match=r"OddState.state returned what JSON cannot hold"):
        opened(open_class("OddState")).reset().result(20)


def test_closing_is_not_journaled(opened: Open) -> None:
    environment = opened(open_class("Counter"))
    play(environment, 1)
    assert environment.close().result(20) is None
    # A request after that brings the instance back.
    assert environment.call(1, 0, "add", {"number": 1}).result(20).text == "The count is 2."


def test_an_environment_that_is_closed_under_a_call_did_not_fail(opened: Open) -> None:
    environment = opened(open_class("Saved"))
    play(environment, 1)
    # As where a run ends early: the call is over when its state can no longer be saved.
    late = environment.call(1, 0, "wait_and_add", {"number": 1, "seconds": 0.2})
    environment.close().result(20)
    with pytest.raises(EnvironmentFailed):
        late.result(20)
    # The next attempt makes the call again.
    again = opened(open_class("Saved"))
    assert again.reset().result(20) == environment._journal.get("reset", 0)["messages"]  # type: ignore[index]
    assert again.call(0, 0, "add", {"number": 1}).result(20).text == "The count is 1."
    assert again.call(1, 0, "wait_and_add", {"number": 1, "seconds": 0.0}).result(20).error == ""
