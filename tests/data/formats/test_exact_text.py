"""Texts come out of a conversion as they went in: indentation, line ends and all."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.formats import SourceFormat, convert, detect
from align.data.formats.answers import parse_transcript
from align.data.rows import assistant, user
from tests.support.data.formats.conversions import chat, dropped, row, sharegpt
from tests.support.refusals import Refused

CODE = "    y = x + 0\n    return y\n"
ASK = "  def f(x):\n"


def hh(reply: str) -> str:
    return f"\n\nHuman: {ASK}\n\nAssistant: {reply}"


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("messages", {"messages": chat(ASK, CODE)}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]}, assistant(CODE)]}),
        ("sharegpt", {"conversations": sharegpt(ASK, CODE)}),
        ("prompt_completion", {"prompt": ASK, "completion": CODE}),
        ("prompt_completion", {"instruction": ASK, "input": " ", "response": CODE}),
        ("alpaca", {"instruction": ASK, "input": "", "output": CODE}),
        ("dolly", {"instruction": ASK, "context": "", "response": CODE}),
        ("self_instruct", {"instruction": ASK, "instances": [{"input": "", "output": CODE}]}),
        ("hh_rlhf", {"chosen": hh(CODE), "rejected": hh("no")}),
        ("preferences", {"prompt": ASK, "chosen": CODE, "rejected": "no"}),
        ("unpaired", {"prompt": ASK, "completion": CODE, "label": True}),
        ("scored", {"prompt": ASK, "responses": [CODE, "no"], "scores": [2, 1]}),
        ("ranked", {"prompt": ASK, "answers": [{"text": CODE, "rank": 1}, {"text": "no", "rank": 2}]}),
        ("stepwise", {"prompt": ASK, "completions": [CODE], "labels": [True]}),
        ("oasst", {
            "message_tree_id": "t",
            "prompt": {"role": "prompter", "text": ASK, "replies": [{"role": "assistant", "text": CODE, "rank": 0}]},
        }),
    ],
)  # fmt: skip
def test_code_is_still_code(form: Any, record: dict[str, Any]) -> None:
    actual = row(record, form)
    assert actual["prompt"] == [user(ASK)]
    assert actual["completion"] == [assistant(CODE)]


def test_all_parts_of_a_prompt_are_exact() -> None:
    record = {"instruction": ASK, "input": CODE, "output": "a", "system": " s\n", "history": [[ASK, CODE]]}
    assert row(record, "alpaca")["prompt"] == [
        {"role": "system", "content": " s\n"}, *chat(ASK, CODE), user(f"{ASK}\n\n{CODE}")
    ]  # fmt: skip
    assert row(record | {"input": " \n"}, "alpaca")["prompt"][-1] == user(ASK)


def test_only_the_separator_of_a_transcript_is_no_text() -> None:
    assert parse_transcript("\n\nHuman:  a \n\nAssistant:\n    b\n") == [user(" a "), assistant("\n    b\n")]


def test_a_worked_sum_loses_its_notes_alone() -> None:
    record = {"question": " q\n", "answer": "  48/2 = <<48/2=24>>24.\n\n#### $1,024\n"}
    actual = row(record, "gsm8k")
    assert actual["prompt"] == [user(" q\n")] and actual["checks"] == '{"answer": "1,024"}'
    assert actual["completion"] == [assistant("  48/2 = 24.\n\n#### $1,024\n")]


def test_white_space_alone_is_still_no_answer() -> None:
    assert dropped({"prompt": "q", "completion": " \n"}, "prompt_completion") == "empty reply"
    assert dropped({"prompt": " \n", "completion": "a"}, "prompt_completion") == "empty prompt turn"
    pair = {"prompt": "q", "chosen": "a", "rejected": "a\n"}
    assert dropped(pair, "preferences", "preferences") == "chosen equals rejected"


@pytest.mark.parametrize(
    ("value", "written"),
    [(3, "3"), (-2.5, "-2.5"), (10**20, "1" + "0" * 20), (10**400, "1" + "0" * 400)],
    ids=["whole", "fraction", "large", "beyond a float"],
)
def test_numbers_become_text(value: float, written: str) -> None:
    record = {"question": "q", "answer": value}
    assert detect([record] * 3, "instructions").form == "prompt_completion"
    assert row(record, "prompt_completion")["completion"] == [assistant(written)]
    assert row({"instruction": value, "output": value}, "alpaca") == {
        "prompt": [user(written)], "completion": [assistant(written)], "checks": ""
    }  # fmt: skip
    assert row({"prompt": "q", "chosen": value, "rejected": "a"}, "preferences")["completion"] == [assistant(written)]
    assert row({"messages": chat("q", value)}, "messages")["completion"] == [assistant(written)]  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, float("nan"), ["a"]])
def test_other_values_are_not_reported_as_misspelled(refused: Refused, value: Any) -> None:
    refused(
        lambda: convert({"question": "q", "answer": value}, SourceFormat("prompt_completion"), "f:1", "instructions")
    )
    refused(detect, [{"question": "q", "answer": value}], "instructions")
