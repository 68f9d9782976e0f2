"""Chat and ShareGPT messages: roles, turns, tools and their calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.config.recipe.format_options import FormatOptions
from align.data.formats import SourceFormat, convert
from align.data.rows import BadRecord, assistant, user
from tests.support.data.formats.conversions import chat, dropped, row, rows, sharegpt
from tests.support.refusals import Refused

SYSTEM = {"role": "system", "content": "s"}


def test_messages_are_cut_into_prompt_and_answer() -> None:
    actual = row({"messages": [SYSTEM, *chat("a", "b", "c", "d")]}, "messages")
    assert actual == {"prompt": [SYSTEM, *chat("a", "b", "c")], "completion": [assistant("d")], "checks": ""}
    assert row({"messages": json.dumps(chat("a", "b"))}, "messages")["completion"] == [assistant("b")]
    assert row({"conversation": chat("a", "b"), "system": "s"}, "messages")["prompt"] == [SYSTEM, *chat("a")]
    # A system prompt that is there already is not written twice.
    assert row({"messages": [SYSTEM, *chat("a", "b")], "system": "t"}, "messages")["prompt"] == [SYSTEM, *chat("a")]


def test_sharegpt_roles_are_mapped_and_unknown_ones_are_refused(refused: Refused) -> None:
    assert row({"conversations": sharegpt("a", "b")}, "sharegpt")["prompt"] == chat("a")
    odd = [{"from": "human", "value": "a"}, {"from": "robot", "value": "b"}]
    refused(lambda: convert({"conversations": odd}, SourceFormat("sharegpt"), "f:1", "instructions"))
    assert row({"conversations": odd}, "sharegpt", roles={"robot": "assistant"})["completion"] == [assistant("b")]


def test_every_answer_or_the_last() -> None:
    record = {"messages": chat("a", "b", "c", "d")}
    assert [r["prompt"] for r in rows(record, "messages", turns="all")] == [chat("a"), chat("a", "b", "c")]
    assert [r["completion"] for r in rows(record, "messages", turns="all")] == [[assistant("b")], [assistant("d")]]


def test_thoughts_of_messages_are_written_as_tags(refused: Refused) -> None:
    turns = [user("a"), assistant("b") | {"reasoning_content": "first\n"}, user("c")]
    turns.append({**assistant("d"), "reasoning_content": "second"})
    record = {"messages": turns}
    last, every = row(record, "messages", thoughts="last"), row(record, "messages")
    assert last["prompt"] == chat("a", "b", "c")
    assert last["completion"] == every["completion"] == [assistant("<think>\nsecond\n</think>\n\nd")]
    assert every["prompt"][1] == assistant("<think>\nfirst\n</think>\n\nb")
    each = rows(record, "messages", turns="all")
    assert each[0]["completion"] == [assistant("<think>\nfirst\n</think>\n\nb")]
    ignored = row(record, "messages", ignore=["reasoning_content"])
    assert ignored["completion"] == [assistant("d")]
    refused(FormatOptions, turns="all", thoughts="last")


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_thought_fields_mean_the_same(refused: Refused, field: str) -> None:
    expected = [assistant("<think>\nhm\n</think>\n\nb")]
    assert row({"messages": [user("a"), assistant("b") | {field: "hm"}]}, "messages")["completion"] == expected
    written = assistant("<think>hm</think>b")
    assert row({"messages": [user("a"), written | {field: "hm"}]}, "messages")["completion"] == [written]
    pair = {"prompt": "a", "chosen": [assistant("b") | {field: "hm"}], "rejected": [assistant("c")]}
    assert row(pair, "preferences", "preferences")["chosen"] == expected
    if field != "reasoning":
        assert row({"prompt": "a", "completion": "b", field: "hm"}, "prompt_completion")["completion"] == expected
    refused(
        lambda: convert(
            {"messages": [user("a"), written | {field: "no"}]}, SourceFormat("messages"), "f:1", "instructions"
        )
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chat("a"), "last turn is not the assistant's"),
        ([], "empty conversation"),
        (chat("a", " "), "empty reply"),
        (chat(" ", "b"), "empty prompt turn"),
        ([user("a"), user("b"), assistant("c")], "roles do not alternate"),
        ([assistant("a"), assistant("b")], "last prompt turn is not the user's"),
        ([assistant("a"), user("b"), assistant("b")], "first turn is not the user's"),
        ([user("a"), {"role": "tool", "content": "s"}, assistant("b")], "roles do not alternate"),
        ([user("a"), {"role": "system", "content": "s"}, user("a"), assistant("b")], "system turn in the middle"),
    ],
)
def test_messages_that_cannot_be_used(messages: list[dict[str, str]], reason: str) -> None:
    assert dropped({"messages": messages}, "messages") == reason


def test_what_a_normalize_step_may_mend_passes_unchecked() -> None:
    record = {"messages": [user("a"), user("b"), assistant("c")]}
    (actual,) = convert(record, SourceFormat("messages"), "f:1", "instructions", check=False)
    assert isinstance(actual, dict) and actual["prompt"] == [user("a"), user("b")]
    (actual,) = convert({"messages": chat("a", "")}, SourceFormat("messages"), "f:1", "instructions", check=False)
    assert not isinstance(actual, dict) and actual.reason == "empty reply"


def test_text_in_parts_is_joined_and_pictures_drop_the_record() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert row({"messages": [{"role": "user", "content": parts}, assistant("c")]}, "messages")["prompt"] == chat("ab")
    picture = [{"role": "user", "content": [{"type": "image", "url": "x"}]}, assistant("c")]
    assert dropped({"messages": picture}, "messages") == "a message with a part of type image, and only text is trained"


CALL = {"name": "weather", "arguments": {"city": "Rom"}}
NESTED = [{"type": "function", "function": CALL}]
RESULT = {"role": "tool", "content": "sun"}


@pytest.mark.parametrize(
    "calling",
    [
        {"role": "assistant", "content": "", "tool_calls": NESTED},
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rom"}'}}]},
        {"role": "assistant", "content": "", "function_call": CALL},
        {"from": "function_call", "value": json.dumps(CALL)},
        # Tables give each call the arguments of all others.
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "weather", "arguments": {"city": "Rom", "n": None}}],
        },
    ],
)
def test_calls_of_tools_become_one_spelling(calling: dict[str, Any]) -> None:
    actual = row({"messages": [user("a"), calling, RESULT, assistant("Sunny.")]}, "messages")
    assert actual["completion"] == [assistant("Sunny.")]
    assert actual["prompt"][2] == RESULT and actual["prompt"][1]["content"] == ""
    assert json.loads(actual["prompt"][1]["tool_calls"]) == NESTED
    assert "tool_calls" not in actual["prompt"][0]


def test_a_call_can_be_the_answer() -> None:
    record = {"messages": [user("a"), {"role": "assistant", "content": "", "tool_calls": NESTED}]}
    assert json.loads(row(record, "messages")["completion"][0]["tool_calls"]) == NESTED
    two = [row(r, "messages", turns="all") for r in (record,)]
    assert two[0]["prompt"] == [user("a")]


def test_tools_are_kept_as_json() -> None:
    tool = {"name": "weather", "parameters": {"city": {"type": "string"}, "n": None}}
    for tools in ([tool], json.dumps([{**tool, "parameters": {"city": {"type": "string"}}}])):
        actual = row({"messages": chat("a", "b"), "tools": tools}, "messages")
        assert json.loads(actual["tools"]) == [
            {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
        ]
    for none in ([], "", "[]", None):
        assert "tools" not in row({"messages": chat("a", "b"), "tools": none}, "messages")


def test_tools_and_calls_make_other_ids() -> None:
    def name(**more: Any) -> str:
        messages = [
            user("a"),
            {"role": "assistant", "content": "", "tool_calls": more["calls"]},
            RESULT,
            assistant("b"),
        ]
        (actual,) = convert(
            {"messages": messages, "tools": more["tools"]}, SourceFormat("messages"), "f:1", "instructions"
        )
        assert isinstance(actual, dict)
        return str(actual["id"])

    names = [name(calls=[CALL], tools=[]), name(calls=[{"name": "time"}], tools=[]), name(calls=[CALL], tools=[CALL])]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "'messages' holds text that is not JSON"),
        (["x"], "'messages' holds str, expected a message"),
        ([{"role": "user", "content": True}], "'messages.content' holds bool, expected text or a number"),
        ([user("a"), {"role": "assistant", "tool_calls": [{"id": "x"}]}], "a call of a tool without its name"),
        ([user("a"), {"from": "function_call", "value": "not json"}], "holds text that is not JSON"),
        ([{"role": ["x"], "content": "a"}], "role .'x'.; known roles"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(BadRecord, match=f"f:1: .*{message}") as caught:
        convert({"messages": messages}, SourceFormat("messages"), "f:1", "instructions")
    assert caught.value.where == "f:1"
