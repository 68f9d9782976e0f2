"""Formats with one answer to a prompt, and the one with none."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.formats import SourceFormat, convert
from align.data.rows import BadRecord, assistant
from tests.support.data.formats.conversions import chat, dropped, row, rows

SYSTEM = {"role": "system", "content": "s"}


def test_alpaca_folds_the_input_into_the_prompt() -> None:
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3 "}
    assert row(record, "alpaca") == {"prompt": chat("Add.\n\n1 and 2"), "completion": [assistant("3 ")], "checks": ""}
    for blank in ({"input": ""}, {"input": " "}, {"input": None}):
        assert row(record | blank, "alpaca")["prompt"] == chat("Add.")
    # An unfilled {{name}} is a matter of filters: here it stays.
    assert row(record | {"output": "I am {{name}}."}, "alpaca")["completion"] == [assistant("I am {{name}}.")]
    assert dropped(record | {"output": " "}, "alpaca") == "empty reply"


def test_alpaca_with_system_and_history() -> None:
    record = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert row(record, "alpaca")["prompt"] == [SYSTEM, *chat("a", "b", "c")]
    with pytest.raises(BadRecord, match="'history' holds something that is not a pair"):
        convert(record | {"history": ["a"]}, SourceFormat("alpaca"), "f:1", "instructions")


def test_dolly_folds_the_context() -> None:
    record = {"instruction": "Who?", "context": "It was Ann.", "response": "Ann", "category": "qa"}
    assert row(record, "dolly") == {
        "prompt": chat("Who?\n\nIt was Ann."), "completion": [assistant("Ann")], "checks": ""
    }  # fmt: skip
    for blank in ("", None):
        assert row(record | {"context": blank}, "dolly")["prompt"] == chat("Who?")


def test_self_instruct_gives_a_row_for_each_instance() -> None:
    instances = [{"input": "", "output": "x"}, {"input": "i", "output": "y"}]
    first, second = rows({"instruction": "Do.", "instances": instances}, "self_instruct")
    assert (first["prompt"], first["completion"]) == (chat("Do."), [assistant("x")])
    assert (second["prompt"], second["completion"]) == (chat("Do.\n\ni"), [assistant("y")])
    assert dropped({"instruction": "Do.", "instances": []}, "self_instruct") == "no instances"


def test_gsm8k() -> None:
    actual = row({"question": "How many?", "answer": "48/2 = <<48/2=24>>24.\n#### 1,024"}, "gsm8k")
    assert actual["prompt"] == chat("How many?") and actual["checks"] == '{"answer": "1,024"}'
    assert actual["completion"] == [assistant("48/2 = 24.\n#### 1,024")]
    assert dropped({"question": "q", "answer": "24"}, "gsm8k") == "no number after ####"
    assert dropped({"question": "q", "answer": "#### none"}, "gsm8k") == "no number after ####"


def test_prompt_and_completion_in_their_spellings() -> None:
    wanted = {"prompt": chat("a"), "completion": [assistant("b")], "checks": ""}
    for record in (
        {"prompt": "a", "completion": "b"},
        {"question": "a", "response": "b"},
        {"query": "a", "response": "b", "type": "x"},
        {"prompt": chat("a"), "completion": [assistant("b")]},
    ):
        assert row(record, "prompt_completion") == wanted
    before = {"prompt": chat("a", "b", "c"), "completion": [assistant("d")]}
    assert row(before, "prompt_completion")["prompt"] == chat("a", "b", "c")
    orca = {"system_prompt": "s", "question": "q", "response": "r"}
    assert row(orca, "prompt_completion")["prompt"] == [SYSTEM, *chat("q")]
    with pytest.raises(BadRecord, match="f:1: 'completion' holds 2 messages, expected the answer alone"):
        convert({"prompt": "a", "completion": chat("a", "b")}, SourceFormat("prompt_completion"), "f:1", "instructions")


def test_prompts_alone() -> None:
    for record in ({"prompt": "a"}, {"question": "a"}, {"messages": chat("a")}, {"prompt": chat("a")}):
        assert row(record, "prompt", "prompts") == {"prompt": chat("a"), "checks": ""}
    assert dropped({"messages": chat("a", "b")}, "prompt", "prompts") == "last prompt turn is not the user's"
    with pytest.raises(BadRecord, match="a record of format prompt cannot give instructions"):
        convert({"prompt": "a"}, SourceFormat("prompt"), "f:1", "instructions")


@pytest.mark.parametrize("form", ["alpaca", "dolly", "gsm8k"])
def test_text_must_be_text(form: Any) -> None:
    record = {"instruction": ["x"], "question": True, "context": "", "output": "o", "response": "r", "answer": "#### 1"}
    with pytest.raises(BadRecord, match="f:1: '(instruction|question)' holds (list|bool), expected text or a number"):
        convert(record, SourceFormat(form), "f:1", "instructions")


def test_columns_are_renamed_first() -> None:
    record = {"prompt": "old", "Q": "new", "A": "x"}
    actual = row(record, "prompt_completion", columns={"prompt": "Q", "completion": "A"})
    assert (actual["prompt"], actual["completion"]) == (chat("new"), [assistant("x")])
