"""Each format, what it drops and why, and what an unrecognised record is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.data.formats import FIELDS, Conversation, Dropped, convert, parse_transcript
from align.data.rows import assistant, user
from align.errors import UserError


def good(record: dict[str, Any], form: Any) -> Conversation:
    found = convert(record, form, "f:1")
    assert isinstance(found, Conversation), found
    return found


def dropped(record: dict[str, Any], form: Any) -> str:
    found = convert(record, form, "f:1")
    assert isinstance(found, Dropped), found
    return found.reason


def chat(*contents: str) -> list[dict[str, str]]:
    return [(user if i % 2 == 0 else assistant)(content) for i, content in enumerate(contents)]


def test_messages_and_sharegpt() -> None:
    system = {"role": "system", "content": "s"}
    found = good({"messages": [system, *chat("a", "b", "c", "d ")]}, "messages")
    assert found == Conversation([system, *chat("a", "b", "c")], "d")
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert good({"conversations": sharegpt}, "messages") == Conversation(chat("a"), "b")
    assert good({"messages": json.dumps(chat("a", "b"))}, "messages").completion == "b"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chat("a"), "last turn is not the assistant's"),
        ([], "empty reply"),
        (chat("a", " "), "empty reply"),
        (chat(" ", "b"), "empty prompt turn"),
        ([user("a"), user("b"), assistant("c")], "roles do not alternate"),
        ([assistant("a"), assistant("b")], "last prompt turn is not the user's"),
        ([user("a"), {"role": "system", "content": "s"}, user("a"), assistant("b")], "system turn in the middle"),
    ],
)
def test_messages_that_cannot_be_used(messages: list[dict[str, str]], reason: str) -> None:
    assert dropped({"messages": messages}, "messages") == reason


def test_prompt_completion_and_prompt() -> None:
    assert good({"prompt": "a", "completion": "b"}, "prompt_completion") == Conversation(chat("a"), "b")
    pair = {"prompt": chat("a", "b", "c"), "completion": [assistant("d")]}
    assert good(pair, "prompt_completion") == Conversation(chat("a", "b", "c"), "d")
    assert good({"prompt": "a"}, "prompt") == Conversation(chat("a"))
    with pytest.raises(UserError, match="f:1: 'completion' holds 2 messages"):
        convert({"prompt": "a", "completion": chat("a", "b")}, "prompt_completion", "f:1")


def test_alpaca_folds_the_input_into_the_prompt() -> None:
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert good(record, "alpaca") == Conversation(chat("Add.\n\n1 and 2"), "3")
    assert good(record | {"input": ""}, "alpaca").prompt == chat("Add.")
    assert dropped(record | {"output": "I am {{name}}."}, "alpaca") == "unfilled {{placeholder}}"


def test_gsm8k() -> None:
    found = good({"question": "How many?", "answer": "48/2 = <<48/2=24>>24.\n#### 1,024"}, "gsm8k")
    assert found == Conversation(chat("How many?"), "48/2 = 24.\n#### 1,024", checks='{"answer": "1,024"}')
    assert dropped({"question": "q", "answer": "24"}, "gsm8k") == "no number after ####"
    assert dropped({"question": "q", "answer": "#### none"}, "gsm8k") == "no number after ####"


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_hh_cuts_turns_before_it_compares() -> None:
    # Both replies open alike: a cut by characters would put "I think th" into the prompt.
    found = good({"chosen": hh("q", "I think this"), "rejected": hh("q", "I think that")}, "hh_rlhf")
    assert found == Conversation(chat("q"), chosen="I think this", rejected="I think that")
    assert parse_transcript("hello\n\nHuman: q") is None
    assert parse_transcript("no turns") is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (hh("q", "a"), hh("q", "a"), "chosen equals rejected"),
        (hh("q", "a"), hh("other", "b"), "prompts differ"),
        (hh("q", "a"), hh("q", ""), "empty reply"),
        (hh("q", "a", "b"), hh("q", "a", "c"), "last turn is not the assistant's"),
        ("q", hh("q", "a"), "not a transcript"),
        (hh("q", "", "r", "a"), hh("q", "", "r", "b"), "empty prompt turn"),
    ],
)
def test_hh_pairs_that_cannot_be_used(chosen: str, rejected: str, reason: str) -> None:
    assert dropped({"chosen": chosen, "rejected": rejected}, "hh_rlhf") == reason


def test_preferences_in_every_spelling() -> None:
    wanted = Conversation(chat("q"), chosen="a", rejected="b")
    for record in (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": chat("q"), "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ):
        assert good(record, "preferences") == wanted
    scored = good(
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 8, "score_rejected": 3.5}, "preferences"
    )
    assert (scored.chosen_score, scored.rejected_score) == (8.0, 3.5)
    assert dropped({"chosen": chat("q", "a"), "rejected": chat("r", "b")}, "preferences") == "prompts differ"
    assert dropped({"prompt": "q", "chosen": "a ", "rejected": "a"}, "preferences") == "chosen equals rejected"
    assert dropped({"prompt": "q", "chosen": "a", "rejected": " "}, "preferences") == "empty reply"
    with pytest.raises(UserError, match="there is no 'prompt'"):
        convert({"chosen": "a", "rejected": "b"}, "preferences", "f:1")


@pytest.mark.parametrize(
    ("record", "form", "message"),
    [
        ({"question": "q", "answr": "a"}, "gsm8k", "f:1: not a record of format gsm8k: 'answer' missing; it has "
         "'question', 'answr'. Is 'answr' meant as 'answer'?"),
        ({"instruction": "i", "output": "o"}, "messages", "It fits format: alpaca."),
        ({"prompt": "p", "answer": "a"}, "prompt_completion", "It fits format: prompt."),
        ({"chosen": "p", "text": "a"}, "preferences", r"It nearly fits: hh_rlhf \(chosen \+ rejected\)"),
        ({}, "alpaca", "it has no fields"),
        ({"messages": "hello"}, "messages", "f:1: 'messages' holds text where a list of messages was expected"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "role 'robot'; known roles: user, human"),
        ({"messages": ["x"]}, "messages", "holds str where a message"),
        ({"instruction": 3, "output": "o"}, "alpaca", "'instruction' holds int, expected text"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "x"}, "preferences", "a score is 'x'"),
    ],
)  # fmt: skip
def test_unrecognised_records(record: dict[str, Any], form: Any, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        convert(record, form, "f:1")


def test_every_format_has_fields_and_a_converter() -> None:
    from typing import get_args

    from align.data.formats import CONVERTERS, Format

    assert set(get_args(Format)) >= set(FIELDS) == set(CONVERTERS)
