"""Fields that no conversion reads are named, and refused where they would change what is trained on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.data.formats import FieldUsage, SourceFormat, convert
from align.data.rows import BadRecord, assistant, user
from tests.support.data.formats.conversions import chat, dropped, row, rows, sharegpt, source_format


def unused(record: dict[str, Any], form: Any, kind: str = "instructions", **options: Any) -> dict[str, int]:
    usage = FieldUsage()
    convert(record, source_format(form, **options), "f:1", kind, usage=usage)
    return dict(usage.unused)


def test_fields_that_were_not_read_are_named_once_a_record() -> None:
    record = {"id": 1, "messages": [{**turn, "name": "x"} for turn in chat("a", "b")], "lang": "en", "empty": ""}
    assert unused(record, "messages") == {"id": 1, "messages.name": 1, "lang": 1}
    # the same, where the conversation is written as JSON text
    assert unused(record | {"messages": json.dumps(record["messages"])}, "messages") == unused(record, "messages")
    assert unused({"instruction": "i", "input": "", "output": "o", "text": "all"}, "alpaca") == {"text": 1}
    tools = [{"type": "function", "function": {"name": "f", "strict": True}}]
    assert unused({"messages": chat("a", "b"), "tools": tools}, "messages") == {}
    scored = {"prompt": "q", "responses": [{"text": "a", "score": 1, "critique": "c"}, {"text": "b", "score": 2}]}
    assert unused(scored, "scored", "preferences") == {"responses.critique": 1}
    tree = {"role": "prompter", "text": "q", "lang": "en", "labels": {"spam": 0}, "replies": [
        {"role": "assistant", "text": "a", "rank": 0, "replies": [{"role": "prompter", "text": "r", "user_id": "u"}]},
    ]}  # fmt: skip
    # a field that repeats in itself is named once; the turn behind the answers was not needed
    assert unused({"message_tree_id": "t", "prompt": tree}, "oasst") == {
        "message_tree_id": 1, "prompt.lang": 1, "prompt.labels": 1, "prompt.replies.user_id": 1
    }  # fmt: skip
    assert unused({"messages": chat("a", " "), "id": 1}, "messages") == {}  # it made no row


@pytest.mark.parametrize(
    ("record", "form", "field"),
    [
        ({"messages": chat("<image> a", "b"), "images": ["x.png"]}, "messages", "images"),
        ({"prompt": "a", "completion": "b", "videos": ["x"]}, "prompt_completion", "videos"),
        ({"messages": [user("a"), assistant("b") | {"reasoning_content": "t"}]}, "messages",
         "messages.reasoning_content"),
        ({"messages": [user("a"), assistant("b") | {"thinking": "t"}]}, "messages", "messages.thinking"),
        ({"conversations": [{**turn, "reasoning": "t"} for turn in sharegpt("a", "b")]}, "sharegpt",
         "conversations.reasoning"),
        ({"prompt": "a", "completion": "b", "reasoning_content": "t"}, "prompt_completion", "reasoning_content"),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "prompt_completion", "choices"),
        ({"question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "A"}, "prompt_completion", "'A' to 'D'"),
        ({"question": "q", "context": "c", "answer": "A"}, "prompt_completion", "context"),
        ({"question": "q", "answer": "1 #### 2", "tools": [{"name": "f"}]}, "gsm8k", "tools"),
        ({"messages": chat("a", "b"), "chat_template_kwargs": {"enable_thinking": False}}, "messages",
         "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_a_field_that_means_something_is_refused_by_name(record: dict[str, Any], form: Any, field: str) -> None:
    with pytest.raises(BadRecord, match=rf"f:1: '?{field}'? would be lost: .*options.ignore: \[") as caught:
        convert(record, SourceFormat(form), "f:1", "instructions")
    names = str(caught.value).rsplit("options.ignore: [", 1)[1].split("]")[0].split(", ")
    assert len(rows(record, form, ignore=names)) == 1
    assert set(unused(record, form, ignore=names)) == set(names)


def test_what_stands_in_fields_of_an_instruction_is_part_of_the_prompt() -> None:
    record = {"instruction": "Add.", "input": "1 and 2", "response": "3"}
    assert row(record, "prompt_completion")["prompt"] == chat("Add.\n\n1 and 2")
    assert row({"instruction": "Add.", "input": "1 and 2"}, "prompt", "prompts")["prompt"] == chat("Add.\n\n1 and 2")
    labeled = record | {"label": True}
    assert row(labeled, "unpaired", "unpaired")["prompt"] == chat("Add.\n\n1 and 2")


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"loss": False}])
def test_a_message_that_is_not_to_be_trained_on_is_no_answer(mark: dict[str, Any]) -> None:
    messages = [user("q"), assistant("a"), user("r"), assistant("b") | mark]
    assert row({"messages": messages}, "messages")["completion"] == [assistant("a")]
    assert [r["completion"] for r in rows({"messages": messages}, "messages", turns="all")] == [[assistant("a")]]
    earlier = [user("q"), assistant("a") | mark, user("r"), assistant("b")]
    actual = row({"messages": earlier}, "messages")
    assert actual["completion"] == [assistant("b")]
    assert actual["prompt"] == [user("q"), assistant("a") | {"train": False}, user("r")]
    assert unused({"messages": earlier}, "messages") == {}
    never = {"messages": [user("q"), assistant("a") | mark]}
    assert dropped(never, "messages") == "every answer is marked not to be trained on"
    assert row(never, "messages", "prompts")["prompt"] == chat("q")
    assert dropped({"messages": earlier}, "messages", "texts") == "a turn is marked not to be trained on"


def test_marks_of_pairs_and_labeled_answers() -> None:
    pair = {"prompt": "q", "chosen": [assistant("a") | {"weight": 0}], "rejected": [assistant("b")]}
    assert dropped(pair, "preferences", "preferences") == "every answer is marked not to be trained on"
    labeled = {"messages": [user("q"), assistant("a") | {"train": False}], "label": True}
    assert dropped(labeled, "unpaired", "unpaired") == "every answer is marked not to be trained on"
    good = {"messages": [user("q"), assistant("a") | {"train": True}], "label": True}
    assert row(good, "unpaired", "unpaired")["completion"] == [assistant("a")]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            assistant("a") | {"weight": 0.5},
            r"'messages.weight' is 0.5, and align trains on a message as a whole or not",
        ),
        (assistant("a") | {"train": "no"}, "'messages.train' is 'no'"),
    ],
)
def test_marks_that_cannot_be_honored(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        convert({"messages": [user("q"), turn]}, SourceFormat("messages"), "f:1", "instructions")
    mark = "weight" if "weight" in turn else "train"
    actual = row({"messages": [user("q"), turn]}, "messages", ignore=[mark])
    assert actual["completion"] == [assistant("a")]


def test_users_turns_are_never_trained_on() -> None:
    record = {"messages": [user("q") | {"train": True}, assistant("a")]}
    with pytest.raises(BadRecord, match="of role user, and align trains on the assistant's messages alone"):
        convert(record, SourceFormat("messages"), "f:1", "instructions")
    assert row({"messages": [user("q") | {"weight": 0}, assistant("a")]}, "messages")["prompt"] == chat("q")


def test_marks_make_other_ids() -> None:
    def name(**mark: Any) -> str:
        messages = [user("q"), assistant("a") | mark, user("r"), assistant("b")]
        (actual,) = convert({"messages": messages}, SourceFormat("messages"), "f:1", "instructions")
        assert isinstance(actual, dict)
        return str(actual["id"])

    assert name() == name(train=True) != name(train=False)
