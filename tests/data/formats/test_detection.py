"""What ``format: auto`` chooses and why, and what an unrecognized record is told."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from align.config.recipe.format_options import KINDS, Format
from align.data.formats import CONVERTERS, SourceFormat, convert, detect
from align.data.formats.detection import SHAPES
from align.data.formats.fields import FIELDS
from align.data.rows import assistant
from tests.support.data.formats.conversions import chat, sharegpt
from tests.support.refusals import Refused

HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}


@pytest.mark.parametrize(
    ("record", "kind", "form"),
    [
        ({"instruction": "i", "input": "", "output": "o", "category": "x"}, "instructions", "alpaca"),
        ({"instruction": "i", "context": "", "response": "o", "category": "x"}, "instructions", "dolly"),
        ({"conversations": sharegpt("a", "b"), "id": "x"}, "instructions", "sharegpt"),
        ({"messages": chat("a", "b"), "prompt": "a", "prompt_id": "x"}, "prompts", "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "instructions", "messages"),
        ({"prompt": "a", "completion": "b"}, "instructions", "prompt_completion"),
        ({"prompt": "a", "completion": "b"}, None, "prompt_completion"),
        ({"system_prompt": "s", "question": "q", "response": "r"}, "instructions", "prompt_completion"),
        ({"question": "q", "answer": "1 #### 2"}, "instructions", "gsm8k"),
        ({"question": "q", "answer": "1"}, "instructions", "prompt_completion"),
        (HH, "preferences", "hh_rlhf"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preferences", "preferences"),
        ({"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b"), "messages": chat("q", "a")},
         "preferences", "preferences"),
        ({"conversations": sharegpt("q"), "chosen": {"from": "gpt", "value": "a"}, "rejected": {"value": "b"}},
         "preferences", "preferences"),
        ({"question": "q", "response_j": "a", "response_k": "b"}, "preferences", "preferences"),
        ({"prompt": "q", "completion": "a", "label": False}, "unpaired", "unpaired"),
        ({"messages": chat("q", "a"), "label": True}, None, "unpaired"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}, "preferences", "scored"),
        ({"instruction": "q", "completions": [{"response": "a", "annotations": {}}]}, "preferences", "scored"),
        ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}]}, "preferences", "ranked"),
        ({"prompt": {"text": "q", "replies": []}, "message_tree_id": "t"}, "preferences", "oasst"),
        ({"instruction": "q", "instances": [], "id": "x"}, "instructions", "self_instruct"),
        ({"prompt": "q", "type": "x", "label": "safe"}, "prompts", "prompt"),
    ],
)  # fmt: skip
def test_auto_finds_the_format(record: dict[str, Any], kind: str | None, form: str) -> None:
    detection = detect([record] * 3, kind)
    assert detection.form == form
    assert detection.reason.startswith(f"{form}: 3 of 3 records have ")


def test_auto_says_what_it_chose_and_what_that_covers() -> None:
    why = detect([{"question": "q", "answer": "1 #### 2"}], "instructions").reason
    assert why == "gsm8k: 1 of 1 records have answer, question; that covers prompt_completion"
    kto = detect([{"messages": chat("q", "a"), "label": True}], "unpaired").reason
    assert kto == "unpaired: 1 of 1 records have label, messages; messages would fit too, but cannot give unpaired"


def test_auto_passes_over_a_few_bad_records(refused: Refused) -> None:
    good, bad = {"instruction": "i", "output": "o"}, {"instruction": "i"}
    assert detect([good] * 9 + [bad], "instructions").reason.startswith("alpaca: 9 of 10 records")
    refused(detect, [good] * 8 + [bad], "instructions")


def test_auto_passes_over_a_conversation_that_nests_without_end() -> None:
    deep, good = {"messages": "[" * 100_000}, {"messages": chat("a", "b")}
    assert detect([deep, *[good] * 9], "instructions").form == "messages"


def test_auto_does_not_guess_between_two(refused: Refused) -> None:
    record = {"instruction": "i", "output": "o", "chosen": "a", "rejected": "b"}
    assert detect([record], "preferences").form == "preferences"
    refused(detect, [record], "instructions")


@pytest.mark.parametrize(
    "record",
    [
        {"text": "x"},
        {"Question": "q", "Answr": "x"},
        {"instruction": "i", "outputt": "o"},
        {"prompt": "q", "responses": ["a", "b"]},
        {"prompt": "q"},
    ],
)
def test_auto_names_the_fields_and_what_nearly_fits(refused: Refused, record: dict[str, Any]) -> None:
    refused(detect, [record], "instructions")


def test_auto_needs_a_record(refused: Refused) -> None:
    refused(detect, [])


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"question": "q", "answr": "a"}, "gsm8k"),
        ({"instruction": "i", "output": "o"}, "messages"),
        ({"chosen": "p", "text": "a"}, "preferences"),
        ({"prompt": None}, "alpaca"),
        ({"chosen": "a", "rejected": None}, "preferences"),
    ],
)  # fmt: skip
def test_unrecognized_records(refused: Refused, record: dict[str, Any], form: Any) -> None:
    refused(lambda: convert(record, SourceFormat(form), "f:1", next(iter(sorted(KINDS[form])))))


def test_every_format_has_fields_a_shape_kinds_and_a_converter() -> None:
    formats = set(get_args(Format)) - {"auto"}
    assert formats == set(FIELDS) == set(KINDS) == set(CONVERTERS)
    assert formats - {"rows"} == set(SHAPES)


def test_rows_keep_id_and_source_in_every_kind() -> None:
    row = {"id": "x", "source": "s", "prompt": chat("q"), "checks": "c", "completion": [assistant("a")], "label": None}
    (same,) = convert(row, SourceFormat("rows"), "f:1", "instructions")
    assert same == {name: value for name, value in row.items() if value is not None}
    (prompt,) = convert(row, SourceFormat("rows"), "f:1", "prompts")
    assert prompt == {"id": "x", "source": "s", "prompt": chat("q"), "checks": "c"}
    pair = {"id": "x", "source": "s", "prompt": chat("q"), "chosen": [assistant("a")], "rejected": [assistant("b")]}
    first, second = convert(pair, SourceFormat("rows"), "f:1", "unpaired")
    assert isinstance(first, dict) and isinstance(second, dict) and len({"x", first["id"], second["id"]}) == 3
