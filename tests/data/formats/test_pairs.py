"""hh-rlhf transcripts, preference pairs and labeled answers."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.formats import SourceFormat, convert
from align.data.formats.preferences import parse_transcript
from align.data.rows import BadRecord, assistant
from tests.support.data.formats.conversions import chat, dropped, row, rows, sharegpt


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[index % 2]}: {turn}" for index, turn in enumerate(turns))


def test_hh_cuts_turns_before_it_compares() -> None:
    # Both replies open alike: a cut by characters would put "I think th" into the prompt.
    actual = row({"chosen": hh("q", "I think this"), "rejected": hh("q", "I think that")}, "hh_rlhf", "preferences")
    assert actual["prompt"] == chat("q")
    assert (actual["chosen"], actual["rejected"]) == ([assistant("I think this")], [assistant("I think that")])
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
    assert dropped({"chosen": chosen, "rejected": rejected}, "hh_rlhf", "preferences") == reason


@pytest.mark.parametrize("rejected", [hh("q", "a"), hh("other", "b"), hh("q", ""), "no transcript"])
@pytest.mark.parametrize("kind", ["instructions", "prompts"])
def test_a_chosen_transcript_stands_alone_where_rows_are_no_pairs(rejected: str, kind: str) -> None:
    converted = row({"chosen": hh("q", "a"), "rejected": rejected}, "hh_rlhf", kind)
    answer = {"completion": [assistant("a")]} if kind == "instructions" else {}
    assert converted == {"prompt": chat("q"), **answer, "checks": ""}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": chat("q"), "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b")},
        # LLaMA-Factory: one message each
        {
            "conversations": sharegpt("q"),
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"question": "q", "response_j": "a", "response_k": "b", "qid": 3},
        {"instruction": "q", "input": "", "output": "x", "chosen": "a", "rejected": "b"},
    ],
)
def test_preferences_in_every_spelling(record: dict[str, Any]) -> None:
    wanted = {"prompt": chat("q"), "chosen": [assistant("a")], "rejected": [assistant("b")], "checks": ""}
    assert row(record, "preferences", "preferences") == wanted


def test_preferences_for_other_kinds() -> None:
    record = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 2, "rejected_score": 1}
    assert row(record, "preferences") == {"prompt": chat("q"), "completion": [assistant("a")], "checks": ""}
    assert row(record, "preferences", "prompts") == {"prompt": chat("q"), "checks": ""}
    good, bad = rows(record, "preferences", "unpaired")
    assert good == {"prompt": chat("q"), "completion": [assistant("a")], "label": True, "checks": ""}
    assert bad == {"prompt": chat("q"), "completion": [assistant("b")], "label": False, "checks": ""}
    same = record | {"rejected": "a "}
    assert dropped(same, "preferences", "unpaired") == dropped(same, "preferences", "preferences")


def test_scores_prompts_and_empty_replies() -> None:
    record = {"prompt": "q", "chosen": "a", "rejected": "b"}
    scored = row(record | {"score_chosen": 8, "score_rejected": "3.5"}, "preferences", "preferences")
    assert (scored["chosen_score"], scored["rejected_score"]) == (8.0, 3.5)
    with pytest.raises(BadRecord, match="'input' would be lost: it is part of the prompt"):
        convert(record | {"input": "more"}, SourceFormat("preferences"), "f:1", "preferences")
    folded = {"instruction": "q", "input": "more", "chosen": "a", "rejected": "b"}
    assert row(folded, "preferences", "preferences")["prompt"] == chat("q\n\nmore")
    differ = {"chosen": chat("q", "a"), "rejected": chat("r", "b")}
    assert dropped(differ, "preferences", "preferences") == "prompts differ"
    assert dropped(record | {"chosen": "b "}, "preferences", "preferences") == "chosen equals rejected"
    assert dropped(record | {"rejected": " "}, "preferences", "preferences") == "empty reply"
    users = {"prompt": "q", "chosen": chat("q"), "rejected": chat("q")}
    assert dropped(users, "preferences", "preferences") == "last turn is not the assistant's"
    for bad, message in (
        ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
        (record | {"score_chosen": "x"}, "a score is 'x', expected a number"),
        (record | {"score_chosen": float("nan")}, "expected a finite number"),
    ):
        with pytest.raises(BadRecord, match=message):
            convert(bad, SourceFormat("preferences"), "f:1", "preferences")


@pytest.mark.parametrize(
    ("label", "truth"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("false", False), ("True", True), ("0", False)],
)
def test_labels_are_read_as_words(label: Any, truth: bool) -> None:
    record = {"prompt": "q", "completion": "a", "label": label}
    assert row(record, "unpaired", "unpaired") == {
        "prompt": chat("q"), "completion": [assistant("a")], "label": truth, "checks": ""
    }  # fmt: skip


def test_unpaired_messages_and_other_kinds() -> None:
    record = {"messages": chat("q", "a", "r", "b"), "label": False}
    assert row(record, "unpaired", "unpaired")["prompt"] == chat("q", "a", "r")
    assert row({"conversations": sharegpt("q", "a"), "kto_tag": True}, "unpaired", "unpaired")["label"] is True
    assert dropped(record, "unpaired") == "labeled as bad"
    assert "label" not in row(record | {"label": True}, "unpaired")
    for bad, message in (
        (record | {"label": "maybe"}, "a label is 'maybe', expected true or false"),
        (record | {"label": 0.5}, "a label is 0.5"),
        ({"prompt": "q", "label": True}, "a label without an answer"),
        ({"prompt": "q", "completion": chat("q", "a", "r", "b")[1:], "label": True}, "holds 3 messages, expected the"),
    ):
        with pytest.raises(BadRecord, match=message):
            convert(bad, SourceFormat("unpaired"), "f:1", "unpaired")
    with pytest.raises(BadRecord, match="format unpaired cannot give preferences; formats that can: .*hh_rlhf"):
        convert(record, SourceFormat("unpaired"), "f:1", "preferences")


def test_labels_make_other_ids() -> None:
    first, second = (
        convert({"prompt": "q", "completion": "a", "label": label}, SourceFormat("unpaired"), "f:1", "unpaired")[0]
        for label in (True, False)
    )
    assert isinstance(first, dict) and isinstance(second, dict) and first["id"] != second["id"]
