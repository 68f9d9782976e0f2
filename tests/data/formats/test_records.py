"""Align's own rows, unread fields of records, and solutions with labeled steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.formats import FieldUsage, SourceFormat, convert, detect
from align.data.rows import BadRecord, assistant, read_rows, user, write_rows
from tests.support.data.formats.conversions import chat, dropped, row, rows, sharegpt, source_format
from tests.support.refusals import Refused

CALLS = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]


def test_a_list_of_calls_becomes_text() -> None:
    turns = [user("2+2?"), assistant("") | {"tool_calls": CALLS}, {"role": "tool", "content": "4"}]
    read = row({"prompt": turns, "completion": [assistant("4")]}, "rows")
    assert json.loads(read["prompt"][1]["tool_calls"]) == CALLS
    assert turns[1]["tool_calls"] is CALLS, "the record stays as it is"
    assert row(read, "rows") == read


@pytest.mark.parametrize(
    "fields",
    [
        {"responses": ["a", "b"]},
        {"responses": [{"content": None}]},
        {"completion": "text"},
        {"completion": [assistant("a") | {"tool_calls": {"name": "f"}}]},
        {"completion": [assistant("a") | {"name": 5}]},
        {"completion": [assistant("a") | {"train": "no"}]},
        {"_where": "x"},
    ],
)
def test_fields_that_rows_do_not_have(refused: Refused, fields: dict[str, Any]) -> None:
    refused(lambda: convert({"prompt": [user("q")], **fields}, SourceFormat("rows"), "f:1", "instructions"))


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
        ({"messages": [user("a") | {"thinking": "t"}, assistant("b")]}, "messages", "messages.thinking"),
        ({"conversations": [{**turn, "reasoning": "t"} for turn in sharegpt("a", "b")]}, "sharegpt",
         "conversations.reasoning"),
        ({"prompt": "a", "reasoning_content": "t", "chosen": "b", "rejected": "c"}, "preferences",
         "reasoning_content"),
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


def test_fields_of_an_instruction_are_part_of_the_prompt() -> None:
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
    "turn",
    [
        assistant("a") | {"weight": 0.5},
        assistant("a") | {"train": "no"},
    ],
)
def test_marks_that_cannot_be_honored(refused: Refused, turn: dict[str, Any]) -> None:
    refused(lambda: convert({"messages": [user("q"), turn]}, SourceFormat("messages"), "f:1", "instructions"))
    mark = "weight" if "weight" in turn else "train"
    actual = row({"messages": [user("q"), turn]}, "messages", ignore=[mark])
    assert actual["completion"] == [assistant("a")]


def test_users_turns_are_never_trained_on(refused: Refused) -> None:
    record = {"messages": [user("q") | {"train": True}, assistant("a")]}
    refused(lambda: convert(record, SourceFormat("messages"), "f:1", "instructions"))
    assert row({"messages": [user("q") | {"weight": 0}, assistant("a")]}, "messages")["prompt"] == chat("q")


def test_marks_make_other_ids() -> None:
    def name(**mark: Any) -> str:
        messages = [user("q"), assistant("a") | mark, user("r"), assistant("b")]
        (actual,) = convert({"messages": messages}, SourceFormat("messages"), "f:1", "instructions")
        assert isinstance(actual, dict)
        return str(actual["id"])

    assert name() == name(train=True) != name(train=False)


RECORD = {"prompt": "1 + 1 + 1?", "completions": ["1 + 1 is 2.", " ", "2 + 1 is 4."], "labels": [True, True, False]}


def test_a_row_has_its_steps_and_is_good_where_all_are(tmp_path: Path) -> None:
    (row,) = convert(RECORD, SourceFormat("stepwise"), "f:1", "unpaired")
    assert row["completion"] == [{"role": "assistant", "content": "1 + 1 is 2.\n\n2 + 1 is 4."}]
    assert row["label"] is False
    assert row["steps"] == [{"content": "1 + 1 is 2.", "label": 1.0}, {"content": "2 + 1 is 4.", "label": 0.0}]
    write_rows(tmp_path / "train.parquet", [{**row, "source": "s"}])
    assert read_rows(tmp_path / "train.parquet")[0]["steps"] == row["steps"]
    (good,) = convert({**RECORD, "labels": [1, 1, 0.5]}, SourceFormat("stepwise"), "f:1", "unpaired")
    assert good["label"] is True
    assert good["steps"][1]["label"] == 0.5


def test_step_label_of_minus_one_is_wrong() -> None:
    (row,) = convert({**RECORD, "labels": [1, 0, -1]}, SourceFormat("stepwise"), "f:1", "unpaired")
    assert [step["label"] for step in row["steps"]] == [1.0, 0.0]
    (prompt,) = convert(RECORD, SourceFormat("stepwise"), "f:1", "prompts")
    assert "steps" not in prompt


def test_it_is_recognized() -> None:
    assert detect([RECORD], "unpaired").form == "stepwise"
    assert detect([{"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]}], "preferences").form == "scored"


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": [True]},
        {"completions": "one text"},
        {"labels": [1, 1, 7]},
    ],
)
def test_what_is_malformed_is_refused(refused: Refused, fields: dict[str, object]) -> None:
    refused(lambda: convert(RECORD | fields, SourceFormat("stepwise"), "f:1", "unpaired"))
