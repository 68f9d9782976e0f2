"""Turns of a simulated user: asked for in batches, journaled before they are seen, and never asked for twice."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from align.data.rows import assistant, user
from align.environments.errors import EnvironmentFailed
from align.environments.journal import Journal
from align.environments.simulated_user import UserAnswer, UserRequest
from align.environments.user_turns import UserTurns
from align.errors import UserError
from tests.support.environments.users import ScriptedUser

ROW = {"goal": "a lamp"}
MESSAGES = [user("Hi"), assistant("Yes?")]


def read_prompt(row: Any) -> str:
    return f"You want {row['goal']}."


def open_turns(folder: Path, model: ScriptedUser) -> UserTurns:
    return UserTurns(model, read_prompt, Journal(folder / "journal"))


def test_what_waits_is_one_batch_in_the_order_of_the_episodes(tmp_path: Path) -> None:
    model = ScriptedUser(lambda request: f"answer {request.episode}")
    turns = open_turns(tmp_path, model)
    futures = {episode: turns.ask(episode, 1, ROW, MESSAGES, 7 + episode) for episode in (2, 0, 1)}
    assert turns.waiting == 3 and turns.can_send and not any(future.done() for future in futures.values())
    turns.send()
    assert [[request.episode for request in batch] for batch in model.batches] == [[0, 1, 2]]
    assert model.batches[0][0] == UserRequest(0, 1, model.batches[0][0].messages, 7)
    assert model.batches[0][0].messages[0] == {"role": "system", "content": "You want a lamp."}
    assert {episode: future.result() for episode, future in futures.items()} == {
        episode: f"answer {episode}" for episode in range(3)
    }
    assert turns.waiting == 0 and not turns.can_send


def test_the_journal_answers_what_was_answered_before(tmp_path: Path) -> None:
    def answer(request: UserRequest) -> UserAnswer:
        return UserAnswer(failure="gone") if request.episode else UserAnswer("A lamp.")

    turns = open_turns(tmp_path, ScriptedUser(answer))
    for episode in range(2):
        turns.ask(episode, 1, ROW, MESSAGES, 7)
    turns.send()
    silent = ScriptedUser(lambda request: pytest.fail("the user was asked again"))
    again = open_turns(tmp_path, silent)
    assert again.ask(0, 1, ROW, MESSAGES, 7).result() == "A lamp."
    # A failure stays one: what followed from it is in the journal, too.
    with pytest.raises(EnvironmentFailed, match="gone"):
        again.ask(1, 1, ROW, MESSAGES, 7).result()
    assert again.waiting == 0
    again.ask(0, 2, ROW, MESSAGES, 7)
    assert again.waiting == 1


def test_an_answer_is_in_the_journal_before_it_is_seen(tmp_path: Path) -> None:
    turns = open_turns(tmp_path, ScriptedUser(lambda request: "A lamp."))
    future = turns.ask(0, 1, ROW, MESSAGES, 7)
    stored: list[Any] = []
    future.add_done_callback(lambda done: stored.append(Journal(tmp_path / "journal").get("user", 0, 1)))
    turns.send()
    assert stored == [{"text": "A lamp.", "failure": ""}]


def test_a_user_elsewhere_answers_while_the_caller_goes_on(tmp_path: Path) -> None:
    release = threading.Event()

    def answer(request: UserRequest) -> str:
        assert release.wait(20)
        return f"answer {request.episode}"

    turns = open_turns(tmp_path, ScriptedUser(answer, in_background=True))
    first = turns.ask(0, 1, ROW, MESSAGES, 7)
    turns.send()
    second = turns.ask(1, 1, ROW, MESSAGES, 7)
    assert not first.done() and turns.waiting == 1 and not turns.can_send  # one batch at a time
    sendable: Future[bool] = Future()
    first.add_done_callback(lambda done: sendable.set_result(turns.can_send))
    release.set()
    # Whoever is woken by an answer can send the next batch.
    assert first.result(20) == "answer 0" and sendable.result(20)
    turns.send()
    assert second.result(20) == "answer 1"


@pytest.mark.parametrize("in_background", [False, True])
def test_a_user_that_cannot_be_used_is_an_error_of_the_run(tmp_path: Path, in_background: bool) -> None:
    def refuse(requests: Sequence[UserRequest]) -> str:
        raise UserError("the budget is spent")

    turns = open_turns(tmp_path, ScriptedUser(refuse, in_background=in_background))
    future = turns.ask(0, 1, ROW, MESSAGES, 7)
    with pytest.raises(UserError, match="the budget is spent"):
        turns.send()
        future.result(20)
    assert Journal(tmp_path / "journal").get("user", 0, 1) is None
