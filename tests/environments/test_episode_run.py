"""The course of an episode: its actions, and the effect of turns, results and failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from align.data.rows import user
from align.environments.chat_episodes import read_turn
from align.environments.episode import PolicyTurn
from align.environments.episode_run import (
    Act,
    EpisodeRun,
    PromptedTurns,
    SampleTurn,
    row_messages,
    turn_seed,
    with_system,
)
from align.environments.journal import CallResult
from align.environments.results import Scores, Step
from align.inference.requests import Answer
from tests.support.environments.letters import EOS
from tests.support.environments.letters import letter_rules as rules

ROW = {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "1+1?"}]}


def begun(value=None, **changes):
    run = EpisodeRun(ROW, 5, rules(**changes))
    assert run.action == Act("reset", 0, 0, (ROW,))
    run.take_result(None if value is None else [{"role": "user", "content": value}])
    return run


def turn(text, finished=True):
    ids = [ord(character) for character in text] + [EOS] * finished
    return PolicyTurn(ids, [-1.0] * len(ids), finished, text)


def call(**arguments):
    return '<tool_call>{"name": "add", "arguments": ' + str(arguments).replace("'", '"') + "}</tool_call>"


def test_a_turn_without_calls_ends_the_episode_which_is_scored():
    run = begun()
    assert run.action == SampleTurn(0, [ord(c) for c in "S1+1?"], 100, turn_seed(5, 0))
    run.take_turn(turn("2"))
    assert run.action == Act("score", 0, 0, (run.episode.messages,))
    run.take_result(Scores(1.0, {"right": 1.0}))
    episode = run.episode
    assert run.action is None
    assert (episode.stop, episode.score, episode.parts) == ("finished", 1.0, {"right": 1.0})
    assert [message["content"] for message in episode.messages] == ["S", "1+1?", "2"]


def test_environment_reads_answers_without_thoughts():
    run = begun(has_step=True)
    run.take_turn(replace(turn("<think>a</think>2"), thought_tokens=16, thought_end=16, forced=[8, 9]))
    assert run.action == Act("step", 0, 0, ("2",))
    run.take_result(Step([user("more")], False))
    run.take_turn(replace(turn("<think>b", finished=False), thought_tokens=8, thought_end=8, is_open=True))
    assert isinstance(run.action, Act)
    read = run.action.arguments[0]
    assert [message["content"] for message in read] == ["S", "1+1?", "2", "more", ""]
    assert [message.get("reasoning_content") for message in read[2::2]] == ["<think>a</think>", "<think>b"]
    # The conversation keeps its texts, and the mask has neither forced tokens nor the environment's.
    episode = run.episode
    assert episode.messages[2]["content"] == "<think>a</think>2"
    between = len(episode.observations[0])
    assert episode.mask == [True] * 8 + [False] * 2 + [True] * 8 + [False] * between + [True] * 8
    assert (episode.forced, episode.thought_tokens, episode.answer_text.is_open) == ([8, 9], 24, True)


def test_thought_of_a_served_turn_is_not_its_answer():
    served = read_turn(Answer("<think>a</think>2"))
    assert (served.answer_text, served.answer_text.thought, served.text) == (
        "2",
        "<think>a</think>",
        "<think>a</think>2",
    )
    assert read_turn(Answer("<think>a", finished=False)).answer_text.is_open


def test_calls_are_made_one_after_another_and_answered_together():
    run = begun()
    text = call(a=1) + call(a=2)
    run.take_turn(turn(text))
    assert run.action == Act("call", 0, 0, ("add", {"a": 1}))
    run.take_result(CallResult("one", seconds=0.5))
    assert run.action == Act("call", 0, 1, ("add", {"a": 2}))
    run.take_result(CallResult("no", "raised"))
    action = run.action
    assert isinstance(action, SampleTurn) and action.turn == 1 and action.seed == turn_seed(5, 1)
    # The sampled ids as they are, then the results alone.
    expected = "S1+1?" + text
    assert action.prompt == [*map(ord, expected), EOS, *map(ord, "<one><Error: no>")]
    assert [(record.error, record.seconds) for record in run.episode.calls] == [("", 0.5), ("raised", 0.0)]


def test_what_is_malformed_is_answered_without_a_call():
    run = begun()
    run.take_turn(turn("<tool_call>{oops</tool_call>"))
    assert isinstance(run.action, SampleTurn)
    assert [record.error for record in run.episode.calls] == ["malformed"]


def test_a_turn_that_was_cut_off_ends_the_episode():
    run = begun()
    run.take_turn(turn(call(a=1)[:-4], finished=False))
    assert run.action == Act("score", 0, 0, (run.episode.messages,)) and run.episode.stop == "truncated"
    assert not run.episode.calls


def test_calls_of_the_last_turn_are_not_made():
    run = begun(max_turns=1)
    run.take_turn(turn(call(a=1)))
    assert run.action == Act("score", 0, 0, (run.episode.messages,)) and run.episode.stop == "max_turns"


def test_results_that_leave_no_room_end_the_episode_with_a_turn():
    run = begun(max_tokens=100)
    run.take_turn(turn(call(a=1)))
    run.take_result(CallResult("x" * 60))
    assert run.action == Act("score", 0, 0, (run.episode.messages,)) and run.episode.stop == "truncated"
    assert run.episode.observations == [] and run.episode.mask[-1]


def test_the_last_turn_gets_the_tokens_that_are_left():
    run = begun(max_tokens=100)
    text = call(a=1)
    run.take_turn(turn(text))
    run.take_result(CallResult("x"))
    assert run.action.max_tokens == 100 - (len(text) + 1) - 3


def test_a_game_answers_turns_until_it_is_done():
    run = begun("guess", call_format=None, has_step=True)
    assert run.action.prompt == [ord(c) for c in "guess"]
    run.take_turn(turn("5"))
    assert run.action == Act("step", 0, 0, ("5",))
    run.take_result(Step([{"role": "user", "content": "more"}]))
    assert isinstance(run.action, SampleTurn)
    run.take_turn(turn("7"))
    run.take_result(Step([{"role": "user", "content": "yes"}], True))
    assert run.action == Act("score", 1, 0, (run.episode.messages,)) and run.episode.stop == "finished"
    assert len(run.episode.observations) == 1  # what is said after the end is not read


def test_a_game_that_goes_on_too_long_is_cut_off():
    run = begun("guess", call_format=None, has_step=True, max_turns=1)
    run.take_turn(turn("5"))
    run.take_result(Step([{"role": "user", "content": "more"}]))
    assert run.episode.stop == "max_turns"


def test_a_failure_ends_the_episode_with_its_reason():
    run = begun()
    run.take_turn(turn(call(a=1)))
    run.take_result(CallResult("2"))
    run.take_turn(turn(call(a=1)))
    run.fail("call: the database is gone")
    episode = run.episode
    assert run.action is None
    assert (episode.stop, episode.failure) == ("failed", "call: the database is gone")
    assert len(episode.turns) == 2 and len(episode.observations) == 1 and episode.mask[-1]


def test_a_failure_of_reset_still_gives_a_response():
    run = EpisodeRun(ROW, 5, rules())
    run.fail("reset: no such table")
    assert run.action is None and run.episode.token_ids == [EOS] and run.episode.failure == "reset: no such table"


def test_too_long_prompt_fails_the_episode():
    run = begun("x" * 50)
    assert run.action is None and run.episode.stop == "failed"
    assert "max_prompt_tokens 20" in run.episode.failure


def test_scores_of_another_number_of_turns_are_a_failure():
    run = begun()
    run.take_turn(turn("2"))
    run.take_result(Scores(3.0, {}, [1.0, 2.0]))
    assert run.episode.failure == "score returned 2 scores by turn, and the episode has 1."


def test_messages_of_a_row():
    assert row_messages(ROW) == ROW["prompt"]
    assert row_messages({"prompt": "plain"}) == [{"role": "user", "content": "plain"}]


def test_seeds_of_turns_differ_and_repeat():
    assert turn_seed(5, 0) == turn_seed(5, 0) != turn_seed(5, 1) != turn_seed(6, 1)


SYSTEM = {"role": "system", "content": "S"}


class Recorder:
    """Turns that keep the messages that they were asked to render."""

    eos = 9

    def __init__(self) -> None:
        self.rendered: list[list[dict[str, Any]]] = []

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        self.rendered.append(messages)
        return [1]

    def between(
        self, messages: list[dict[str, Any]], calls: Sequence[Any] = (), prompt: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        self.rendered.append([*prompt, *messages])
        return [2]


def test_a_system_message_stands_before_those_that_have_none() -> None:
    recorder = Recorder()
    turns = PromptedTurns(recorder, with_system("S"))
    assert (turns.eos, turns.prompt([user("a")]), turns.between([user("b")], (), [user("a")])) == (9, [1], [2])
    assert recorder.rendered == [[SYSTEM, user("a")], [SYSTEM, user("a"), user("b")]]
    own = [{"role": "system", "content": "mine"}, user("a")]
    assert with_system("S")(own) == own and with_system(None)([user("a")]) == [user("a")]
