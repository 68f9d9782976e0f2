"""Normalizing: what is cleaned, what stays, that twice is once, and that clean rows come back as they are."""

import copy
import gzip
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.recipe.step_settings import NormalizeStep
from align.data.rows import Dropped, assistant, user
from align.data.steps.normalize import text_normalizer
from align.data.steps.step import start_step
from tests.support.data.steps.rows_for_steps import CONTEXT, instruction, pair

ENGLAND = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
CODE = "Look:\n\n```python\nx = 1   \n\n\n\n\n\ty = 2\n```\nDone."


def clean(text: str, **settings: Any) -> str:
    return text_normalizer(NormalizeStep(type="normalize", **settings))(text)


def step(row: dict[str, Any], **settings: Any) -> Any:
    (result,) = start_step(NormalizeStep(type="normalize", **settings), CONTEXT).apply([row])
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\r\ntwo\rthree\u2028four\x0bfive", "one\ntwo\nthree\nfour\nfive"),
        ("bell\x07 null\x00 escape\x1b[31mred\x1b[0m del\x7f c1\x9f", "bell null escapered del c1"),
        ("zero\u200bwidth\ufeff and so\u00adft \u2060joined", "zerowidth and soft joined"),
        ("left\u202eright\u2066isolated\u2069", "leftrightisolated"),
        ("می\u200cخواهم and 👨\u200d👩\u200d👧", "می\u200cخواهم and 👨\u200d👩\u200d👧"),
        ("hidden\U000e0041\U000e0042 text", "hidden text"),
        (ENGLAND, ENGLAND),
        ("half \ud83d pair, whole \ud83d\ude00", "half \ufffd pair, whole 😀"),
        ("cafe\u0301", "café"),
        ("x² ﬁ Ａ", "x² ﬁ Ａ"),
        ("  hello  \nworld\t\n", "hello\nworld"),
        ("\n \n\nfirst", "first"),
        ("a\n\nb", "a\n\nb"),
        ("a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("a\u00a0\nb\u3000\n", "a\nb"),
        ("    indented code\n  stays", "    indented code\n  stays"),
        ("if x:\n        y\n\tz", "if x:\n        y\n\tz"),
        (CODE, CODE),
        ("~~~\na  \n~~~\nb  ", "~~~\na  \n~~~\nb"),
        ("````\n```\nx  \n````\ny  \nz", "````\n```\nx  \n````\ny\nz"),
        ("an open fence\n```\nx  \n\n\n\n\ny", "an open fence\n```\nx  \n\n\n\n\ny"),
        ("```quoted``` word  \nb  \nc", "```quoted``` word\nb\nc"),
        ("```\na  \n``` b\nc  \n```\nd  \ne", "```\na  \n``` b\nc  \n```\nd\ne"),
        ("", ""),
    ],
)  # fmt: skip
def test_texts(text, expected):
    assert clean(text) == expected


def test_settings():
    assert clean("x² ﬁ Ａ", unicode="NFKC") == "x2 fi A"
    assert clean("cafe\u0301", unicode="none") == "cafe\u0301"
    assert clean("a\u200bb\x00", control=False) == "a\u200bb\x00"
    assert clean("a  \nb  ", whitespace=False) == "a  \nb  "
    assert clean("a\n\n\n\nb", blank_lines=1) == "a\n\nb"
    assert clean("cafÃ© – itâ€™s", fix_encoding=True) == "café – it’s"
    assert clean("cafÃ©") == "cafÃ©"
    assert clean("caf\u200bÃ\u200b©", fix_encoding=True) == "café"  # seen only without the zero-width space


@pytest.mark.parametrize("levels", range(1, 9))
def test_encoding_is_repaired_round_by_round(levels):
    """Each wrong decoding hides the one below it behind a zero-width space, which is gone a round later."""
    text = "é"
    for _ in range(levels):
        text = text.encode().decode("latin-1")
        text = text[0] + "\u200b" + text[1:]
    assert clean(f"caf{text}", fix_encoding=True) == "café"
    assert clean("café", fix_encoding=True) == "café"


def test_a_clean_row_is_the_same_object_and_a_changed_one_is_new():
    row = instruction(question="A\n\nB", answer=CODE)
    assert step(row) is row
    dirty = instruction(answer="It rains. \n")
    before = copy.deepcopy(dirty)
    result = step(dirty)
    assert result["completion"] == [assistant("It rains.")]
    assert dirty == before
    assert result == dirty | {"completion": [assistant("It rains.")]}  # "_where" and the rest stay


def test_every_text_of_a_row_is_normalized():
    row = pair("yes \n", "no\u200b", "why\r\n")
    assert step(row) == row | {"chosen": [assistant("yes")], "rejected": [assistant("no")], "prompt": [user("why")]}
    several = instruction(
        responses=[{"content": "a ", "score": 1.0, "rank": 0}, {"content": "b", "score": 0.0, "rank": 1}]
    )
    assert step(several)["responses"][0] == {"content": "a", "score": 1.0, "rank": 0}
    assert step(several)["responses"][1] == several["responses"][1]
    # as read from a Parquet file that also holds rows of another form
    absent = instruction(chosen=None, rejected=None, responses=None)
    assert step(absent) is absent


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def test_turns_are_put_in_order():
    prompt = [
        user("one"),
        system("be brief"),
        user("two"),
        assistant("three"),
        system("be kind"),
        user("four"),
        user(" "),
    ]
    result = step(instruction() | {"prompt": prompt})
    assert result["prompt"] == [system("be brief\n\nbe kind"), user("one\n\ntwo"), assistant("three"), user("four")]
    left = step(instruction() | {"prompt": prompt}, turns=False)
    assert [message["role"] for message in left["prompt"]] == [message["role"] for message in prompt]


def test_merged_turns_are_one_text():
    # each for itself is an open fence with code in it; together the second fence closes the first
    prompt = [user("```\nx"), user("```\ny  \nz")]
    assert step(instruction() | {"prompt": prompt})["prompt"] == [user("```\nx\n\n```\ny\nz")]


def test_an_empty_system_turn_goes():
    assert step(instruction() | {"prompt": [system(" "), user("x")]})["prompt"] == [user("x")]


def test_tool_turns_are_neither_merged_nor_empty():
    call = {"role": "assistant", "content": "", "tool_calls": "[1]"}
    tools = [{"role": "tool", "content": "4"}, {"role": "tool", "content": "5"}]
    row = instruction() | {"prompt": [user("2+2?"), call, *tools]}
    assert step(row) is row


def test_episodes_that_end_alike_after_other_calls_are_a_pair():
    sides = [[assistant("") | {"tool_calls": call}, {"role": "tool", "content": "4"}, assistant("4")] for call in "ab"]
    row = instruction() | dict(zip(("chosen", "rejected"), sides, strict=True))
    del row["completion"]
    assert step(row) is row
    assert step(row | {"rejected": row["chosen"]}).reason == "normalize: chosen equals rejected"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (instruction() | {"prompt": [assistant("hi"), user("x")]}, "first turn is not the user's"),
        (instruction() | {"prompt": [user("x"), assistant("hi"), user(" ")]}, "last prompt turn is not the user's"),
        (instruction() | {"prompt": [user("x"), assistant("\u200b"), user("y")]}, "empty turn"),
        (instruction() | {"prompt": [system("x")]}, "no turns"),
        (instruction(answer=" \u200b\n"), "empty reply"),
        (pair("yes", ""), "empty reply"),
        (pair("same \n", "same"), "chosen equals rejected"),
    ],
)
def test_what_cannot_be_put_in_order_is_dropped(row, reason):
    result = step(row)
    assert isinstance(result, Dropped)
    assert result.reason == f"normalize: {reason}"
    assert not isinstance(step(row, turns=False), Dropped)


PIECES = st.sampled_from(
    ["a", "Z", "é", "e\u0301", "\u0301", " ", "  ", "    ", "\t", "\n", "\n\n\n\n", "\r\n", "\r", "```", "~~~", "````",
     "``", "｀｀｀", "`", "\u200b", "\ufeff", "\u00ad", "\x1b[1m", "\x1b", "[0m", "\u202e", "\u2028", "\x85", "\u00a0",
     "\u3000", "Ã", "©", "â€™", "\ud83d", "\ude00", "🏴", "\U000e0067", "\U000e007f", "ﬁ", "²", "´", "한", "ᄒ", "ᅡ", "ᆫ",
     "- ", "|", "\x1c", "\u1680"]
)  # fmt: skip
TEXTS = st.one_of(st.lists(PIECES, max_size=24).map("".join), st.text(st.characters(), max_size=40))
SETTINGS = st.fixed_dictionaries(
    {
        "unicode": st.sampled_from(["NFC", "NFKC", "none"]),
        "fix_encoding": st.booleans(),
        "control": st.booleans(),
        "whitespace": st.booleans(),
        "blank_lines": st.integers(1, 3),
    }
)


@settings(deadline=None, max_examples=600, derandomize=True)
@given(TEXTS, SETTINGS)
def test_twice_is_once(text, chosen):
    change = text_normalizer(NormalizeStep(type="normalize", **chosen))
    once = change(text)
    assert change(once) == once
    if chosen["control"]:
        once.encode("utf-8")
        assert not set(once) & set("\r\x00\x1b\u200b\u202e\u2028\x85")
    if chosen["unicode"] == "NFC":
        assert unicodedata.is_normalized("NFC", once)
    if chosen["whitespace"] and "`" not in once and "~" not in once:
        assert once == once.strip("\n") and all(line == line.rstrip() for line in once.split("\n"))


MESSAGES = st.builds(
    lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant", "system"]), TEXTS
)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(MESSAGES, min_size=1, max_size=6), TEXTS)
def test_rows_twice_is_once(prompt, reply):
    row = instruction(answer=reply) | {"prompt": prompt}
    before = copy.deepcopy(row)
    once = step(row)
    assert row == before
    if isinstance(once, Dropped):
        return
    assert step(once) is once
    roles = [message["role"] for message in once["prompt"] if message["role"] != "system"]
    assert roles == [("user", "assistant")[index % 2] for index in range(len(roles))]


def test_real_transcripts_keep_their_words(shared_data: Path):
    with gzip.open(shared_data / "hh-rlhf" / "helpful-base.test.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["chosen"] for line in file][:400]
    for text in texts:
        assert clean(text).split() == text.split() or any(not char.isprintable() for char in text)
        assert clean(clean(text)) == clean(text)
