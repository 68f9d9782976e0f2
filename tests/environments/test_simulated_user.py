"""A simulated user: the conversation that its model reads, what of its text counts, and what an episode makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.rows import assistant, user
from align.environments.episode import PolicyTurn
from align.environments.episode_run import Act, EpisodeRun, SampleTurn, UserRules, user_seed
from align.environments.results import Scores
from align.environments.simulated_user import GREETING, UserAnswer, read_answer, user_conversation
from tests.support.environments.letters import EOS, letter_rules

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


def test_a_turn_with_a_malformed_call_is_not_shown_nor_what_answers_it() -> None:
    messages = [
        user("Hi"),
        {"role": "assistant", "content": "find({no json", "tool_calls": []},
        {"role": "tool", "content": "Error: A tool call is no valid JSON."},
        {"role": "assistant", "content": "It is here.", "tool_calls": []},
    ]
    assert user_conversation("You want a lamp.", messages)[2:] == [assistant("Hi"), user("It is here.")]


def test_texts_of_one_side_are_joined_and_nothing_said_is_a_turn_too() -> None:
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


def test_a_turn_without_calls_is_answered_and_the_answer_is_not_learned_from() -> None:
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


def test_after_the_last_turn_only_a_user_who_may_end_the_conversation_is_asked() -> None:
    run = begun(max_turns=1)
    run.take_turn(turn("Done."))
    run.take_result("And a chair.")
    assert run.episode.stop == "max_turns" and run.episode.messages[-1] == user("And a chair.")
    endless = begun(stop=None, max_turns=1)
    endless.take_turn(turn("Done."))
    assert endless.episode.stop == "finished" and not endless.episode.user_answers


def test_an_answer_is_cut_like_a_result_and_counts_for_the_tokens_of_the_episode() -> None:
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


def test_a_user_who_speaks_first_begins_below_the_system_message_alone() -> None:
    run = begun(opens=True)
    assert asked(run) == [0, ROW["prompt"][:1], user_seed(5, 0)]
    run.take_result("A lamp?")
    action = run.action
    assert isinstance(action, SampleTurn) and action.turn == 0 and action.prompt == [*map(ord, "SA lamp?")]
    run.take_turn(turn("Yes?"))
    assert asked(run)[0] == 1 and user_seed(5, 1) != user_seed(5, 0)


def test_episodes_with_one_opening_seed_begin_alike_and_go_on_by_their_own() -> None:
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
