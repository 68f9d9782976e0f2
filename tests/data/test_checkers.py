"""The checkers, each against an answer that passes and one that does not."""

from __future__ import annotations

import json

import pytest

from align.data.checkers import KINDS, gold, gsm8k_answer, passes_guard, satisfies
from tests.support.refusals import Refused

PASS_FAIL = {
    "lowercase": ({}, "all small.", "All small."),
    "uppercase": ({}, "ALL LOUD!", "ALL LOUd!"),
    "starts_with": ({"text": "Honestly"}, '"honestly, cats purr."', "Cats purr, honestly."),
    "word_count": ({"low": 3, "high": 3}, "Don't wake cats.", "Cats purr."),
    "sentence_count": ({"count": 2}, "Cats purr. Dogs bark!", "Cats purr. Dogs bark"),
    "question": ({}, "Do cats purr?", "Cats purr. Do they? Yes."),
    "number": ({"value": 12}, "12.", "7 + 5 = 12"),
    "one_of": ({"answer": "fruit"}, "Fruit.", "fruit or tool"),
    "in_order": ({"items": ["ant", "bee"]}, "Ant, bee", "bee, ant"),
    "numbered_list": ({"count": 2}, "1. Ant\n2) Bee", "1. Ant\n3. Bee"),
    "separated": ({"separator": "|", "count": 3}, "a | b | c", "a | b | "),
    "json_keys": ({"keys": ["a", "b"]}, '{"b": 0, "a": "x"}', '{"a": "x", "b": ""}'),
    "exact": ({"text": "[red fox]"}, " [red fox]. ", "red fox"),
}


def test_every_kind_is_tested() -> None:
    assert set(PASS_FAIL) == set(KINDS)


@pytest.mark.parametrize("kind", PASS_FAIL)
def test_kind_tells_right_from_wrong(kind: str) -> None:
    arguments, right, wrong = PASS_FAIL[kind]
    assert satisfies({"kind": kind, **arguments}, right)
    assert not satisfies({"kind": kind, **arguments}, wrong)
    assert not satisfies({"kind": kind, **arguments}, "")


@pytest.mark.parametrize(
    ("response", "count"),
    [
        ("Cats purr.", 1),
        ("Cats purr. Dogs bark!\nWho sings?", 3),
        ("Really?! Wait...", 2),  # a run of marks is one end
        ('"Cats purr. Dogs bark."', 2),  # quotation marks around the whole
        ("“Cats purr. Dogs bark.”", 2),
        (' " Cats purr. Dogs bark. " ', 2),  # with space on both sides of each mark
        ('He said "Go." She went.', 2),  # the quotation mark ends the sentence before the space does
        ("He said “Go.” She went.", 2),
        ("Pi is 3.14 or so.", 1),  # no space after the point
        ("Cats purr. Dogs bark", None),  # the last sentence has no end
        ("Cats purr. Dogs bark,", None),
        ("Cats purr", None),
        ("", None),
    ],
)
def test_sentences_end_with_marks_before_space(response: str, count: int | None) -> None:
    counts = [n for n in range(5) if satisfies({"kind": "sentence_count", "count": n}, response)]
    assert counts == ([] if count is None else [count])


def test_ifeval_checker_and_the_ones_that_need_downloads(refused: Refused) -> None:
    no_comma = {"kind": "ifeval", "id": "punctuation:no_comma", "args": {}}
    assert satisfies(no_comma, "a b")
    assert not satisfies(no_comma, "a, b")
    refused(satisfies, {"kind": "ifeval", "id": "length_constraints:number_sentences", "args": {}}, "x")
    refused(satisfies, {"kind": "loud"}, "x")


def test_guard() -> None:
    guard = {"min_words": 3, "max_words": 6, "max_share": 0.4, "any_of": ["cat"]}
    assert passes_guard(guard, "Cats purr softly.")
    assert not passes_guard(guard, "Cats purr.")  # two different words
    assert not passes_guard({"min_words": 3}, "cats cats purr purr")  # the same two, twice
    assert not passes_guard(guard, "Dogs bark loudly.")  # off topic
    assert not passes_guard(guard, "Cats purr and purr and purr again.")  # too long
    assert not passes_guard(guard, "cats cats cats purr softly")  # 3 of 5 words the same


def test_gold_is_share_of_constraints_under_the_guard(refused: Refused) -> None:
    checks = {
        "constraints": [{"kind": "lowercase"}, {"kind": "ifeval", "id": "punctuation:no_comma", "args": {}}],
        "guard": {"min_words": 2, "any_of": ["cat"]},
    }
    row = {"id": "1", "source": "t", "checks": json.dumps(checks)}
    assert gold([row] * 4, ["cats purr", "Cats purr", "Cats, purr", ""]) == [1.0, 0.5, 0.0, 0.0]
    assert gold([row], ["dogs bark"]) == [0.0]
    refused(gold, [row | {"checks": ""}], ["x"])


def test_gsm8k_answer(refused: Refused) -> None:
    row = {"id": "1", "source": "g", "checks": '{"answer": "1,200"}'}
    assert gsm8k_answer([row] * 3, ["#### 1200.0", "1200 of 1300", ""]) == [1.0, 0.0, 0.0]
    for spelled in ("$1,200", "1200.00", "1200 dollars"):
        assert gsm8k_answer([row | {"checks": json.dumps({"answer": spelled})}], ["It is 1,200."]) == [1.0]
    refused(gsm8k_answer, [row | {"checks": ""}], ["1"])
