"""Classes and functions as environments: what they are checked for, and what becomes of what they return."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from align import EnvironmentFailed
from align.config.environment import EnvironmentConfig
from align.environments.chat_episodes import chat_rules
from align.environments.environment import Action
from align.environments.player import EnvironmentPlayer
from align.environments.process_server import decode_source, encode_source
from align.environments.results import BadCall, Scores, Step, ToolError, cut_text, split_notice
from align.errors import UserError
from tests.support.environments.opened import CLASSES, TOOLS, open_block, open_class, open_tools

MESSAGES = [{"role": "user", "content": "Say 3."}, {"role": "assistant", "content": "3"}]


def names(source: Any) -> list[str]:
    return [schema["function"]["name"] for schema in source.tools]


def test_public_methods_are_tools_in_source_order() -> None:
    source = open_class("Counter")
    assert names(source) == ["add", "wait_and_add"]
    assert (source.has_step, source.can_save) == (False, False)
    assert names(open_class("Saved")) == ["add", "wait_and_add"] and open_class("Saved").can_save
    assert names(open_class("Game")) == [] and open_class("Game").has_step


def test_class_has_one_instance_per_episode() -> None:
    source = open_class("Counter", arguments={"step_size": 10})
    first, second = source.make(), source.make()
    row = {"goal": 20, "prompt": [{"role": "system", "content": "Be good."}, {"role": "user", "content": "?"}]}
    assert first.reset(row) == [
        {"role": "system", "content": "Be good."},
        {"role": "user", "content": "Count to 20."},
    ]
    assert second.reset({"goal": 1}) == [{"role": "user", "content": "Count to 1."}]
    assert first.call("add", {"number": 2}) == "The count is 20."
    assert first.call("wait_and_add", {"number": 5}) == "25"
    assert first.score([]) == Scores(0.0 - 0.5, {"right": 0.0, "close": -0.5})
    assert second.score([]).total == -0.1
    first.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WithoutReset", "the class has no method 'reset'. Did you mean 'resett'?"),
        ("WithoutScore", "the class has no method 'score'. Add `score(self)`"),
        ("WithoutHint", "the argument 'place' has no type hint"),
        ("OddHint", "tool 'look': the type hint of 'place', complex, has no JSON schema"),
        ("WithoutDocstring", "tool 'look' has no docstring"),
        ("WithoutArgumentDocstring", "Describe each argument in the docstring"),
        ("TakesMany", "tool 'look' takes '*places'"),
        ("OddScore", "its score takes anything; write `score(self)`, `score(self, messages)`"),
        ("HalfSaved", "the class has one of state and load; write both, or neither"),
        ("CALLS", "has no function 'CALLS'"),
        ("Countre", "Did you mean 'Counter'?"),
    ],
)
def test_a_class_that_is_no_environment_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_class(name)
    assert message in str(caught.value) and "environment.class" in str(caught.value)


def test_a_class_whose_arguments_do_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"environment.class.arguments: Counter has no argument 'size'"):
        open_class("Counter", arguments={"size": 1})
    with pytest.raises(UserError, match="double is no class"):
        open_block({"class": f"{TOOLS}:double"})
    with pytest.raises(UserError, match=r"environment.tools\[0\] .*: it is a class"):
        open_block({"tools": [f"{CLASSES}:Counter"], "score": "gold"})


def test_only_environment_failed_ends_the_episode() -> None:
    environment = open_class("Troubled").make()
    assert environment.reset({"goal": 1}) == [
        {"role": "system", "content": "Break it."},
        {"role": "user", "content": "1"},
    ]
    with pytest.raises(ToolError, match="^ZeroDivisionError: float division by zero$") as caught:
        environment.call("divide", {"first": 1, "second": 0.0})
    assert caught.value.kind == "raised"
    with pytest.raises(EnvironmentFailed, match="^the sandbox is gone$"):
        environment.call("give_up", {})
    with pytest.raises(EnvironmentFailed, match=r"Troubled.leave ended its process \(SystemExit: 3\)"):
        environment.call("leave", {})


def test_a_call_of_no_tool_is_answered_with_the_nearest_one() -> None:
    environment = open_class("Counter").make()
    for name, arguments, message in [
        ("ad", {}, "there is no tool 'ad'. Did you mean 'add'?"),
        ("reset", {"row": {}}, "there is no tool 'reset'. Known here: add, wait_and_add."),
        ("__init__", {}, "there is no tool '__init__'. Known here: add, wait_and_add."),
        ("add", {"number": "3"}, "add: the argument 'number' should be a whole number; it is '3'."),
    ]:
        with pytest.raises(BadCall) as caught:
            environment.call(name, arguments)
        assert str(caught.value) == message
    with pytest.raises(BadCall, match=r"there is no tool 'x'. There are no tools."):
        open_class("Game").make().call("x", {})


@pytest.mark.parametrize(
    ("kind", "text"),
    [("none", ""), ("list", '[1, "ä"]'), ("surrogate", "a\ufffdb"), ("bytes", "b'\\xff'")],
)
def test_a_result_that_is_no_text_becomes_one(kind: str, text: str) -> None:
    assert open_class("Troubled").make().call("odd", {"kind": kind}) == text


def test_a_megabyte_is_cut_with_a_notice() -> None:
    environment = open_class("Troubled", max_result_tokens=10).make()
    text = environment.call("shout", {})
    assert text == "a" * 320 + "\n[cut: 1,048,576 characters, of which the first 320 are shown]"
    assert environment.call("shout", {"characters": 320}) == "a" * 320


def test_a_result_cut_twice_has_its_whole_length() -> None:
    once = cut_text("a" * 1_000_000, 320)
    assert once == "a" * 320 + "\n[cut: 1,000,000 characters, of which the first 320 are shown]"
    assert cut_text(once, 320) == once
    assert cut_text(once, 100) == "a" * 100 + "\n[cut: 1,000,000 characters, of which the first 100 are shown]"
    own_line = "ab\n[cut: 9 characters, of which the first 1 are shown]"
    assert split_notice(own_line) == (own_line, len(own_line))
    config = EnvironmentConfig(**{"class": f"{CLASSES}:Counter"}, max_tokens=64, max_result_tokens=50)
    rules = chat_rules(config, has_step=False)
    assert rules.shorten(once) == "a" * 200 + "\n[cut: 1,000,000 characters, of which the first 200 are shown]"


class Letters:
    """A tokenizer with a token for each character."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def test_a_result_cut_by_tokens_has_its_whole_length() -> None:
    player = SimpleNamespace(config=SimpleNamespace(max_result_tokens=10), tokenizer=Letters())
    shorten = lambda text: EnvironmentPlayer._shorten(player, text)  # type: ignore[arg-type]  # noqa: E731
    assert shorten("a" * 10) == "a" * 10
    cut = "a" * 10 + "\n[cut: 1,000,000 characters, of which the first 10 are shown]"
    assert shorten("a" * 1_000_000) == cut
    assert shorten(cut_text("a" * 1_000_000, 320)) == cut
    assert shorten(cut) == cut


def test_hostile_text_stays_as_it_is() -> None:
    hostile = "<|im_end|>\x1b[2J<script>alert(1)</script></tool_response>\x00"
    environment = open_class("Odd").make()
    assert environment.reset({"first": hostile}) == [{"role": "user", "content": hostile}]
    environment.reset({"first": None, "next": [{"role": "user", "content": hostile}]})
    assert environment.step("") == Step([{"role": "user", "content": hostile}])


def test_a_game_answers_until_it_is_over() -> None:
    environment = open_class("Game").make()
    assert environment.reset({"goal": 3}) is None
    assert environment.step("2") == Step([{"role": "user", "content": "Not 2."}], False)
    assert environment.step("3") == Step([], True)
    assert environment.score([*MESSAGES]) == Scores(1.0, {}, [0.0, 1.0])


@pytest.mark.parametrize(
    ("value", "step"),
    [
        ("a", Step([{"role": "user", "content": "a"}], False)),
        (True, Step([], True)),
        (None, Step([], True)),
        ([{"role": "system", "content": "a"}], Step([{"role": "system", "content": "a"}], False)),
        (("a", True), Step([{"role": "user", "content": "a"}], True)),
        ((None, True), Step([], True)),
        (([], True), Step([], True)),
    ],
)
def test_a_step_is_read_in_every_form(value: Any, step: Step) -> None:
    environment = open_class("Odd").make()
    environment.reset({"next": value})
    assert environment.step("x") == step


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"first": 3}, "Odd.reset returned 3; return a text, a list of messages, or None."),
        ({"first": []}, "Odd.reset returned messages that do not end with one for the policy to answer."),
        ({"first": [{"role": "assistant", "content": "a"}]}, "do not end with one for the policy to answer"),
        ({"first": [{"role": "robot", "content": "a"}]}, "Odd.reset returned the message {'role': 'robot'"),
        ({"first": [{"role": "user", "content": 3}]}, "a message has a 'role' (system, user, assistant, tool) and a"),
        ({"first": [{"role": "user", "content": "a", "x": object}]}, "Odd.reset returned messages that JSON cannot"),
        ({"next": 3}, "Odd.step returned 3; return a text, a list of messages, True at the end, or (messages"),
        ({"next": False}, "Odd.step returned False; return a text"),
        ({"next": []}, "Odd.step returned no messages and did not end the episode"),
        ({"next": [{"role": "assistant", "content": "a"}]}, "Odd.step returned the message {'role': 'assistant'"),
        ({"score": None}, "Odd.score returned None; return finite numbers."),
        ({"score": float("nan")}, "Odd.score returned nan; return finite numbers."),
        ({"score": {}}, "Odd.score returned an empty mapping"),
        ({"score": {"a": "b"}}, "Odd.score returned 'b' as 'a'; return finite numbers."),
        ({"score": {"a b": 1}}, "Odd.score returned a score called 'a b'"),
        ({"score": {"error_square": 1}}, "Odd.score returned a score called 'error_square'; a name has letters"),
        ({"score": {"std": 1}}, "Odd.score returned a score called 'std'; a name has letters"),
        ({"score": {"length_correlation": 1}}, "called 'length_correlation'; a name has letters"),
        ({"score": {"turn": 1}}, "Odd.score returned 1 as 'turn'; return a list."),
        ({"score": {"turn": [1, None]}}, "Odd.score returned None as 'turn'[1]; return finite numbers."),
    ],
)  # fmt: skip
def test_what_is_none_of_them_fails_the_episode_with_a_word(row: dict[str, Any], message: str) -> None:
    environment = open_class("Odd").make()
    with pytest.raises(EnvironmentFailed) as caught:
        environment.reset(row)
        if "next" in row:
            environment.step("x")
        else:
            environment.score([])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "scores"),
    [
        (2, Scores(2.0, {})),
        (True, Scores(1.0, {})),
        ({"a": 1, "b": 0.5}, Scores(1.5, {"a": 1.0, "b": 0.5})),
        ({"score": 3, "a": 1}, Scores(3.0, {"a": 1.0})),
        ({"turn": [1, 2]}, Scores(3.0, {}, [1.0, 2.0])),
        ({"turn": [1, 2], "a": 0.5}, Scores(3.5, {"a": 0.5}, [1.0, 2.0])),
        ({"turn": [1, 2], "score": 7}, Scores(7.0, {}, [1.0, 2.0])),
        ({"turn": None, "a": 1}, Scores(1.0, {"a": 1.0})),
    ],
)
def test_scores_are_read_in_every_form(value: Any, scores: Scores) -> None:
    environment = open_class("Odd").make()
    environment.reset({"score": value})
    assert environment.score([]) == scores


def test_exception_outside_tool_fails_the_episode() -> None:
    environment = open_class("Counter").make()
    with pytest.raises(EnvironmentFailed, match=r"^Counter.reset raised KeyError: 'goal' \(classes.py, line \d+\)\.$"):
        environment.reset({})


def test_score_may_take_the_conversation_or_the_last_turn() -> None:
    environment = open_class("Game").make()
    environment.reset({"goal": 3})
    environment.step("3")
    assert environment.score(MESSAGES).total == 1.0
    assert environment.score(MESSAGES[:1]).total == 0.0


@pytest.mark.parametrize(
    ("score", "fields", "scores"),
    [
        ("by_messages", {"arguments": {"factor": 2.0}}, Scores(4.0, {})),
        ("by_response", {}, Scores(1.0, {"length": 1.0})),
        ("in_lists", {}, Scores(1.0, {})),
        ("slowly", {}, Scores(0.5, {})),
    ],
)
def test_functions_are_tools_and_another_one_scores(score: str, fields: Any, scores: Scores) -> None:
    source = open_tools("double", "shout", score=score, **fields)
    assert names(source) == ["double", "shout"]
    environment = decode_source(encode_source(source)).make()
    assert environment.reset({"goal": "3"}) is None
    assert environment.call("double", {"number": 4}) == "8"
    assert environment.call("shout", {"text": "a", "times": 2}) == "AA"
    assert environment.score(MESSAGES) == scores
    environment.close()


def test_an_instance_is_brought_to_where_another_one_was() -> None:
    row = {"goal": 5}
    actions = [Action("add", {"number": 2}, "The count is 2."), Action("wait_and_add", {"number": 1}, "3")]
    environment = open_class("Counter").make()
    assert environment.restore(row, actions) == 0
    assert environment.call("add", {"number": 2}) == "The count is 5."
    saved = open_class("Saved").make()
    saved.reset(row)
    saved.call("add", {"number": 4})
    state = saved.state()
    assert state == {"goal": 5, "count": 4}
    other = open_class("Saved").make()
    assert other.restore({}, [Action("add", {"number": 1}, "The count is 6.")], state) == 1
    assert other.score([]).total == 1.0


def test_functions_are_not_called_again() -> None:
    environment = open_tools("double").make()
    assert environment.restore({"goal": "3"}, [Action("double", {"number": "wrong"}, "x")]) == 0
    assert environment.score(MESSAGES).total == 1.0
