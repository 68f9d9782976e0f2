"""Several answers to a prompt: scored, ranked, in trees."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.formats import SourceFormat, convert
from align.data.rows import BadRecord, Dropped, assistant
from tests.support.data.formats.conversions import chat, dropped, row, rows


def scores(record: dict[str, Any], **options: Any) -> list[float | None]:
    return [item["score"] for item in row(record, "scored", "preferences", **options)["responses"]]


def rated(rating: str | int, **more: Any) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {"response": f"r{rating}", "annotations": {name: {"Rating": str(rating)} for name in aspects}, **more}


def test_scored_answers_in_their_spellings() -> None:
    wanted = [{"content": "a", "score": 1.0, "rank": None}, {"content": "b", "score": 2.0, "rank": None}]
    for record in (
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "q", "responses": [{"content": "a", "score": 1}, {"content": "b", "score": "2"}]},
        {"question": "q", "answers": [{"text": "a", "pm_score": 1}, {"text": "b", "pm_score": 2}]},
        {"prompt": "q", "responses": [chat("q", "a"), chat("q", "b")], "scores": [1, 2]},
    ):
        assert row(record, "scored", "preferences") == {"prompt": chat("q"), "responses": wanted, "checks": ""}


def test_ultrafeedback_takes_the_aspects_and_mends_ones_that_became_tens() -> None:
    # The overall score of the bad answer was 1, and stands as 10 in the data.
    good, bad = rated(5, overall_score=9.0, model="m"), rated(1, overall_score=10.0)
    record = {"instruction": "q", "models": ["m", "n"], "completions": [good, bad]}
    assert scores(record) == [5.0, 1.0]
    assert scores(record, score="overall_score") == [9.0, 1.0]
    assert scores({**record, "completions": [rated(5, overall_score=10), good]}, score="overall_score") == [10.0, 9.0]
    assert row(record, "scored", "preferences")["responses"][0]["model"] == "m"
    assert row(record, "scored")["completion"] == [assistant("r5")]
    assert scores(record, score="annotations.honesty.Rating") == [5.0, 1.0]


def test_ratings_that_were_not_given_do_not_count() -> None:
    mixed = {"response": "x", "annotations": {"honesty": {"Rating": "N/A"}, "truthfulness": {"Rating": "4"}}}
    record = {"instruction": "q", "completions": [mixed, rated("N/A"), rated(2)]}
    assert scores(record) == [4.0, None, 2.0]
    with pytest.raises(
        BadRecord, match="no answer in 'completions' has a score .auto.; they have annotations, response"
    ):
        convert({**record, "completions": [rated("N/A")]}, SourceFormat("scored"), "f:1", "preferences")


def test_ranks_become_places_from_zero_and_keep_ties() -> None:
    def ranks(record: dict[str, Any]) -> list[int]:
        return [item["rank"] for item in row({"prompt": "q", **record}, "ranked", "preferences")["responses"]]

    nectar = [{"answer": "a", "rank": 2.0}, {"answer": "b", "rank": 1.0}, {"answer": "c", "rank": 7.0}]
    assert ranks({"answers": nectar}) == [1, 0, 2]
    assert ranks({"responses": ["a", "b", "c"], "ranks": [3, 3, 1]}) == [1, 1, 0]
    assert ranks({"output": ["best", "worst"]}) == [0, 1]
    assert row({"instruction": "q", "input": "i", "output": ["best", "x"]}, "ranked")["completion"] == [
        assistant("best")
    ]
    assert dropped({"prompt": "q", "responses": ["a", " "]}, "ranked", "preferences") == "fewer than two answers"
    assert dropped({"prompt": "q", "responses": []}, "ranked", "preferences") == "no answers"


@pytest.mark.parametrize(
    ("record", "form", "message"),
    [
        ({"responses": ["a", "b"], "scores": [1]}, "scored", "'scores' does not have one value for each of the 2"),
        ({"responses": "a"}, "scored", "'responses' holds text that is not JSON"),
        ({"responses": [{"score": 1}]}, "scored", "'responses' has an answer without its text"),
        ({"responses": [{"content": "a", "rank": 1}, "b"]}, "ranked", "some answers in 'responses' have a rank"),
        ({"responses": [{"content": "a", "score": "x"}]}, "scored", "a score is 'x'"),
    ],
)
def test_malformed_answers(record: dict[str, Any], form: Any, message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        convert({"prompt": "q", **record}, SourceFormat(form), "f:1", "preferences")


def node(role: str, text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "lang": "en", "replies": list(replies), **more}


def ask(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return node("prompter", text, *replies, **more)


def say(text: str, rank: int | None, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return node("assistant", text, *replies, rank=rank, **more)


TREE = {
    "message_tree_id": "t",
    "prompt": ask(
        "q",
        say("worse", 1),
        say("best", 0, ask("on?", say("x", None)), ask("more?", say("y", 1), say("z", 0))),
        say("model", 2, synthetic=True),
        say("gone", 3, deleted=True),
    ),
}


def test_trees_give_the_ranked_answers_to_every_turn() -> None:
    first, second = rows(TREE, "oasst", "preferences")
    assert first["prompt"] == chat("q")
    assert [(r["content"], r["rank"]) for r in first["responses"]] == [("best", 0), ("worse", 1)]
    assert second["prompt"] == chat("q", "best", "more?")
    assert [(r["content"], r["rank"]) for r in second["responses"]] == [("z", 0), ("y", 1)]
    every = rows(TREE, "oasst", "preferences", synthetic=True, deleted=True)
    assert [r["content"] for r in every[0]["responses"]] == ["best", "worse", "model", "gone"]


def test_trees_give_conversations_along_the_best_answers() -> None:
    assert row(TREE, "oasst")["prompt"] == chat("q", "best", "on?")
    every = rows(TREE, "oasst", paths="all")
    assert [(r["prompt"], r["completion"]) for r in every] == [
        (chat("q", "best", "on?"), [assistant("x")]),
        (chat("q", "best", "more?"), [assistant("z")]),
    ]
    turns = rows(TREE, "oasst", paths="all", turns="all")
    assert [r["completion"][0]["content"] for r in turns] == ["best", "x", "z"]
    assert row(TREE, "oasst", "prompts")["prompt"] == chat("q", "best", "on?")


def test_what_trees_leave_out_is_counted() -> None:
    left = "deleted, by a model, or of another language"
    assert dropped({**TREE, "prompt": {**TREE["prompt"], "deleted": True}}, "oasst", "preferences") == left
    assert dropped(TREE, "oasst", languages=["de"]) == left
    few = {"message_tree_id": "t", "prompt": ask("q", say("a", 0), say("b", 1, synthetic=True))}
    assert dropped(few, "oasst", "preferences") == f"ranked answers {left}"
    lone = {"message_tree_id": "t", "prompt": ask("q")}
    assert (dropped(lone, "oasst"), dropped(lone, "oasst", "preferences")) == ("no answers", "no two ranked answers")
    assert row(lone, "oasst", "prompts")["prompt"] == chat("q")
    # A turn whose answers were ranked and are left out is counted beside the rows of the others.
    part = {"message_tree_id": "t", "prompt": ask("q", say("a", 0, few["prompt"]), say("b", 1))}
    conversion = convert(part, SourceFormat("oasst"), "f:1", "preferences")
    assert [isinstance(item, Dropped) for item in conversion] == [False, True]
    with pytest.raises(BadRecord, match="'prompt' is not the first message of a tree"):
        convert({"message_tree_id": "t", "prompt": "q"}, SourceFormat("oasst"), "f:1", "preferences")
