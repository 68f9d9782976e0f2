"""A simulated user: the conversation that its model reads, its answers, and its turns in a rollout."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from align.data.rows import assistant, user
from align.environments.episode import PolicyTurn
from align.environments.episode_run import Act, EpisodeRun, SampleTurn, UserRules, user_seed
from align.environments.journal import Journal
from align.environments.results import EnvironmentFailed, Scores
from align.environments.simulated_user import (
    GREETING,
    UserAnswer,
    UserRequest,
    UserTurns,
    read_answer,
    user_conversation,
)
from align.errors import UserError
from tests.support.environments.letters import EOS, letter_rules
from tests.support.environments.users import ScriptedUser

ROW = {"prompt": [{"role": "system", "content": "S"}, user("Hi")]}
SYSTEM = {"role": "system", "content": "You want a lamp."}


def test_roles_are_swapped_below_the_users_own_system_message() -> None:
    messages = [{"role": "system", "content": "You are a shop."}, user("Hi"), assistant("Yes?"), user("A lamp.")]
    assert user_conversation("You want a lamp.", [*messages, assistant("Which?")]) == [
        SYSTEM, user(GREETING), assistant("Hi"), user("Yes?"), assistant("A lamp."), user("Which?"),
    ]  # fmt: skip


def test_a_user_that_speaks_first_is_greeted() -> None:
    assert user_conversation("You want a lamp.", [{"role": "system", "content": "S"}]) == [SYSTEM, user(GREETING)]
    assert user_conversation("You want a lamp.", []) == [SYSTEM, user(GREETING)]


def test_calls_results_and_thoughts_are_not_shown() -> None:
    calls = [{"name": "find", "arguments": {}}]
    messages = [
        user("Hi"),
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "secret"},
        assistant("<think>a secret</think>\nIt is here."),
    ]
    assert user_conversation("You want a lamp.", messages)[2:] == [assistant("Hi"), user("It is here.")]


@pytest.mark.parametrize(
    "thought",
    [
        *(f"<{tag}>a secret</{tag}>" for tag in ("thinking", "thought", "reasoning")),
        "[THINK]a secret[/THINK]",
        "<|channel|>analysis<|message|>a secret<|end|>",
        "a secret</reasoning>",
        "<think></think>\n<think>a secret</think>",
    ],
)
def test_thoughts_of_all_models_are_hidden(thought: str) -> None:
    conversation = user_conversation("You want a lamp.", [user("Hi"), assistant(f"{thought}\nIt is here.")])
    assert conversation[-1] == user("It is here.")
    assert read_answer(f"{thought} A lamp.", True, "BYE") == UserAnswer("A lamp.")


def test_user_does_not_see_malformed_call_or_its_error() -> None:
    messages = [
        user("Hi"),
        {"role": "assistant", "content": "find({no json", "tool_calls": []},
        {"role": "tool", "content": "Error: A tool call is no valid JSON."},
        {"role": "assistant", "content": "It is here.", "tool_calls": []},
    ]
    assert user_conversation("You want a lamp.", messages)[2:] == [assistant("Hi"), user("It is here.")]


def test_consecutive_texts_are_joined() -> None:
    messages = [user("Hi"), user("I"), assistant("a"), assistant("<think>b")]
    assert user_conversation("You want a lamp.", messages)[2:] == [assistant("Hi\n\nI"), user("a")]
    assert user_conversation("You want a lamp.", [user("Hi"), assistant("<think>b")])[-1] == user("")


@pytest.mark.parametrize(
    ("text", "finished", "answer"),
    [
        (" A lamp.\n", True, UserAnswer("A lamp.")),
        ("<think>\nhm\n</think>\nA lamp.", True, UserAnswer("A lamp.")),
        ("Thanks. BYE and more", False, UserAnswer("Thanks. BYE and more")),
        ("BYE", True, UserAnswer("BYE")),
        ("half \ud83d", True, UserAnswer("half \N{REPLACEMENT CHARACTER}")),
    ],
)
def test_what_counts_of_a_text(text: str, finished: bool, answer: UserAnswer) -> None:
    assert read_answer(text, finished, "BYE") == answer


@pytest.mark.parametrize(
    ("text", "finished", "failure"),
    [
        ("A lamp, I", False, "the user's answer was cut off at its max_tokens; raise user.max_tokens."),
        (" \n", True, "the user's answer is empty."),
        ("<think>BYE</think>", True, "the user's answer is empty."),
    ],
)
def test_a_text_that_is_no_answer(text: str, finished: bool, failure: str) -> None:
    assert read_answer(text, finished, "BYE") == UserAnswer(failure=failure)
    assert read_answer("BYE", True, None) == UserAnswer("BYE")


# ---- in an episode ----


def begun(stop: str | None = "BYE", opens: bool = False, **changes: Any) -> EpisodeRun:
    run = EpisodeRun(ROW, 5, letter_rules(user=UserRules(stop, opens), **changes))
    run.take_result(None)
    return run


def turn(text: str, finished: bool = True) -> PolicyTurn:
    ids = [ord(character) for character in text] + [EOS] * finished
    return PolicyTurn(ids, [-1.0] * len(ids), finished, text)


def asked(run: EpisodeRun) -> list[Any]:
    action = run.action
    assert isinstance(action, Act) and action.method == "user"
    return [action.turn, *action.arguments]


def test_user_answer_is_masked() -> None:
    run = begun()
    run.take_turn(turn("Yes?"))
    assert asked(run) == [1, [*ROW["prompt"], assistant("Yes?")], user_seed(5, 1)]
    run.take_result("A lamp.")
    action = run.action
    assert isinstance(action, SampleTurn) and action.turn == 1
    assert action.prompt == [*map(ord, "SHiYes?"), EOS, *map(ord, "<A lamp.>")]
    assert run.episode.mask == [True] * 5 + [False] * 9
    assert run.episode.user_answers == ["A lamp."] and run.episode.messages[-1] == user("A lamp.")


def test_the_users_last_word_ends_the_episode() -> None:
    run = begun()
    run.take_turn(turn("Done."))
    run.take_result("Thanks. BYE now")
    assert run.action == Act("score", 0, 0, (run.episode.messages,)) and run.episode.stop == "finished"
    assert run.episode.messages[-1] == user("Thanks.") and run.episode.user_answers == ["Thanks. BYE now"]
    run.take_result(Scores(1.0, {}))
    assert run.episode.score == 1.0
    silent = begun()
    silent.take_turn(turn("Done."))
    silent.take_result("BYE")
    assert silent.episode.messages[-1] == assistant("Done.") and silent.episode.finished


def test_last_turn_asks_only_user_with_stop_text() -> None:
    run = begun(max_turns=1)
    run.take_turn(turn("Done."))
    run.take_result("And a chair.")
    assert run.episode.stop == "max_turns" and run.episode.messages[-1] == user("And a chair.")
    endless = begun(stop=None, max_turns=1)
    endless.take_turn(turn("Done."))
    assert endless.episode.stop == "finished" and not endless.episode.user_answers


def test_user_answer_is_cut_and_counted() -> None:
    run = begun(shorten=lambda text: text[:3])
    run.take_turn(turn("Yes?"))
    run.take_result("A lamp.")
    assert run.episode.observations == [[*map(ord, "<A l>")]]
    assert run.episode.messages[-1] == user("A l") and run.episode.user_answers == ["A lamp."]
    full = begun(max_tokens=12)
    full.take_turn(turn("Yes?"))
    full.take_result("A lamp.")
    assert full.episode.stop == "truncated" and not full.episode.observations


def test_a_turn_with_calls_or_cut_off_is_none_for_the_user() -> None:
    run = begun()
    run.take_turn(turn('<tool_call>{"name": "add", "arguments": {}}</tool_call>'))
    assert isinstance(run.action, Act) and run.action.method == "call"
    cut = begun()
    cut.take_turn(turn("Yes", finished=False))
    assert cut.episode.stop == "truncated"


def test_first_user_message_follows_system_message() -> None:
    run = begun(opens=True)
    assert asked(run) == [0, ROW["prompt"][:1], user_seed(5, 0)]
    run.take_result("A lamp?")
    action = run.action
    assert isinstance(action, SampleTurn) and action.turn == 0 and action.prompt == [*map(ord, "SA lamp?")]
    run.take_turn(turn("Yes?"))
    assert asked(run)[0] == 1 and user_seed(5, 1) != user_seed(5, 0)


def test_opening_seed_applies_to_first_answer_only() -> None:
    runs = [EpisodeRun(ROW, seed, letter_rules(user=UserRules("BYE", True)), 9) for seed in (5, 6)]
    for run in runs:
        run.take_result(None)
        assert asked(run) == [0, ROW["prompt"][:1], user_seed(9, 0)]
        run.take_result("A lamp?")
        run.take_turn(turn("Yes?"))
        assert asked(run)[2] == user_seed(run.seed, 1)


@pytest.mark.parametrize("answer", ["BYE", "No. BYE"])
def test_a_user_who_ends_before_the_beginning_fails_the_episode(answer: str) -> None:
    run = begun(opens=True)
    run.take_result(answer)
    assert run.action is None and run.episode.stop == "failed"
    assert run.episode.failure == "user: it ended the conversation before the policy spoke."


GOAL_ROW = {"goal": "a lamp"}
MESSAGES = [user("Hi"), assistant("Yes?")]


def read_prompt(row: Any) -> str:
    return f"You want {row['goal']}."


def open_turns(folder: Path, model: ScriptedUser) -> UserTurns:
    return UserTurns(model, read_prompt, Journal(folder / "journal"))


def test_what_waits_is_one_batch_in_the_order_of_the_episodes(tmp_path: Path) -> None:
    model = ScriptedUser(lambda request: f"answer {request.episode}")
    turns = open_turns(tmp_path, model)
    futures = {episode: turns.ask(episode, 1, GOAL_ROW, MESSAGES, 7 + episode) for episode in (2, 0, 1)}
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
        turns.ask(episode, 1, GOAL_ROW, MESSAGES, 7)
    turns.send()
    silent = ScriptedUser(lambda request: pytest.fail("the user was asked again"))
    again = open_turns(tmp_path, silent)
    assert again.ask(0, 1, GOAL_ROW, MESSAGES, 7).result() == "A lamp."
    # A failure stays one: what followed from it is in the journal, too.
    with pytest.raises(EnvironmentFailed, match="gone"):
        again.ask(1, 1, GOAL_ROW, MESSAGES, 7).result()
    assert again.waiting == 0
    again.ask(0, 2, GOAL_ROW, MESSAGES, 7)
    assert again.waiting == 1


def test_an_answer_is_in_the_journal_before_it_is_seen(tmp_path: Path) -> None:
    turns = open_turns(tmp_path, ScriptedUser(lambda request: "A lamp."))
    future = turns.ask(0, 1, GOAL_ROW, MESSAGES, 7)
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
    first = turns.ask(0, 1, GOAL_ROW, MESSAGES, 7)
    turns.send()
    second = turns.ask(1, 1, GOAL_ROW, MESSAGES, 7)
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
    future = turns.ask(0, 1, GOAL_ROW, MESSAGES, 7)
    with pytest.raises(UserError, match="the budget is spent"):
        turns.send()
        future.result(20)
    assert Journal(tmp_path / "journal").get("user", 0, 1) is None
