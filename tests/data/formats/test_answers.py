"""One answer to a prompt, scored and ranked answers, transcripts, pairs and labeled answers."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.formats import SourceFormat, convert
from align.data.formats.answers import parse_transcript
from align.data.rows import Dropped, assistant
from tests.support.data.formats.conversions import chat, dropped, row, rows, sharegpt
from tests.support.refusals import Refused

SYSTEM = {"role": "system", "content": "s"}


def test_alpaca_folds_the_input_into_the_prompt() -> None:
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3 "}
    assert row(record, "alpaca") == {"prompt": chat("Add.\n\n1 and 2"), "completion": [assistant("3 ")], "checks": ""}
    for blank in ({"input": ""}, {"input": " "}, {"input": None}):
        assert row(record | blank, "alpaca")["prompt"] == chat("Add.")
    # An unfilled {{name}} is a matter of filters: here it stays.
    assert row(record | {"output": "I am {{name}}."}, "alpaca")["completion"] == [assistant("I am {{name}}.")]
    assert dropped(record | {"output": " "}, "alpaca") == "empty reply"


def test_alpaca_with_system_and_history(refused: Refused) -> None:
    record = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert row(record, "alpaca")["prompt"] == [SYSTEM, *chat("a", "b", "c")]
    refused(lambda: convert(record | {"history": ["a"]}, SourceFormat("alpaca"), "f:1", "instructions"))


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


def test_prompt_and_completion_in_their_spellings(refused: Refused) -> None:
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
    refused(
        lambda: convert(
            {"prompt": "a", "completion": chat("a", "b")}, SourceFormat("prompt_completion"), "f:1", "instructions"
        )
    )


def test_prompts_alone(refused: Refused) -> None:
    for record in ({"prompt": "a"}, {"question": "a"}, {"messages": chat("a")}, {"prompt": chat("a")}):
        assert row(record, "prompt", "prompts") == {"prompt": chat("a"), "checks": ""}
    assert dropped({"messages": chat("a", "b")}, "prompt", "prompts") == "last prompt turn is not the user's"
    refused(lambda: convert({"prompt": "a"}, SourceFormat("prompt"), "f:1", "instructions"))


@pytest.mark.parametrize("form", ["alpaca", "dolly", "gsm8k"])
def test_text_must_be_text(refused: Refused, form: Any) -> None:
    record = {"instruction": ["x"], "question": True, "context": "", "output": "o", "response": "r", "answer": "#### 1"}
    refused(lambda: convert(record, SourceFormat(form), "f:1", "instructions"))


def test_columns_are_renamed_first() -> None:
    record = {"prompt": "old", "Q": "new", "A": "x"}
    actual = row(record, "prompt_completion", columns={"prompt": "Q", "completion": "A"})
    assert (actual["prompt"], actual["completion"]) == (chat("new"), [assistant("x")])


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


def test_ultrafeedback_mends_scores_of_one_written_as_ten() -> None:
    # The overall score of the bad answer was 1, and stands as 10 in the data.
    good, bad = rated(5, overall_score=9.0, model="m"), rated(1, overall_score=10.0)
    record = {"instruction": "q", "models": ["m", "n"], "completions": [good, bad]}
    assert scores(record) == [5.0, 1.0]
    assert scores(record, score="overall_score") == [9.0, 1.0]
    assert scores({**record, "completions": [rated(5, overall_score=10), good]}, score="overall_score") == [10.0, 9.0]
    assert row(record, "scored", "preferences")["responses"][0]["model"] == "m"
    assert row(record, "scored")["completion"] == [assistant("r5")]
    assert scores(record, score="annotations.honesty.Rating") == [5.0, 1.0]


def test_ratings_that_were_not_given_do_not_count(refused: Refused) -> None:
    mixed = {"response": "x", "annotations": {"honesty": {"Rating": "N/A"}, "truthfulness": {"Rating": "4"}}}
    record = {"instruction": "q", "completions": [mixed, rated("N/A"), rated(2)]}
    assert scores(record) == [4.0, None, 2.0]
    refused(lambda: convert({**record, "completions": [rated("N/A")]}, SourceFormat("scored"), "f:1", "preferences"))


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
    ("record", "form"),
    [
        ({"responses": ["a", "b"], "scores": [1]}, "scored"),
        ({"responses": "a"}, "scored"),
        ({"responses": [{"score": 1}]}, "scored"),
        ({"responses": [{"content": "a", "rank": 1}, "b"]}, "ranked"),
        ({"responses": [{"content": "a", "score": "x"}]}, "scored"),
    ],
)
def test_malformed_answers(refused: Refused, record: dict[str, Any], form: Any) -> None:
    refused(lambda: convert({"prompt": "q", **record}, SourceFormat(form), "f:1", "preferences"))


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


def test_what_trees_leave_out_is_counted(refused: Refused) -> None:
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
    refused(lambda: convert({"message_tree_id": "t", "prompt": "q"}, SourceFormat("oasst"), "f:1", "preferences"))


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
def test_hh_gives_only_chosen_transcript_to_other_kinds(rejected: str, kind: str) -> None:
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


def test_scores_prompts_and_empty_replies(refused: Refused) -> None:
    record = {"prompt": "q", "chosen": "a", "rejected": "b"}
    scored = row(record | {"score_chosen": 8, "score_rejected": "3.5"}, "preferences", "preferences")
    assert (scored["chosen_score"], scored["rejected_score"]) == (8.0, 3.5)
    refused(lambda: convert(record | {"input": "more"}, SourceFormat("preferences"), "f:1", "preferences"))
    folded = {"instruction": "q", "input": "more", "chosen": "a", "rejected": "b"}
    assert row(folded, "preferences", "preferences")["prompt"] == chat("q\n\nmore")
    differ = {"chosen": chat("q", "a"), "rejected": chat("r", "b")}
    assert dropped(differ, "preferences", "preferences") == "prompts differ"
    assert dropped(record | {"chosen": "b "}, "preferences", "preferences") == "chosen equals rejected"
    assert dropped(record | {"rejected": " "}, "preferences", "preferences") == "empty reply"
    users = {"prompt": "q", "chosen": chat("q"), "rejected": chat("q")}
    assert dropped(users, "preferences", "preferences") == "last turn is not the assistant's"
    for bad in (
        {"chosen": "a", "rejected": "b"},
        record | {"score_chosen": "x"},
        record | {"score_chosen": float("nan")},
    ):
        refused(convert, bad, SourceFormat("preferences"), "f:1", "preferences")


@pytest.mark.parametrize(
    ("label", "truth"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("false", False), ("True", True), ("0", False)],
)
def test_labels_are_read_as_words(label: Any, truth: bool) -> None:
    record = {"prompt": "q", "completion": "a", "label": label}
    assert row(record, "unpaired", "unpaired") == {
        "prompt": chat("q"), "completion": [assistant("a")], "label": truth, "checks": ""
    }  # fmt: skip


def test_unpaired_messages_and_other_kinds(refused: Refused) -> None:
    record = {"messages": chat("q", "a", "r", "b"), "label": False}
    assert row(record, "unpaired", "unpaired")["prompt"] == chat("q", "a", "r")
    assert row({"conversations": sharegpt("q", "a"), "kto_tag": True}, "unpaired", "unpaired")["label"] is True
    assert dropped(record, "unpaired") == "labeled as bad"
    assert "label" not in row(record | {"label": True}, "unpaired")
    for bad in (
        record | {"label": "maybe"},
        record | {"label": 0.5},
        {"prompt": "q", "label": True},
        {"prompt": "q", "completion": chat("q", "a", "r", "b")[1:], "label": True},
    ):
        refused(convert, bad, SourceFormat("unpaired"), "f:1", "unpaired")
    refused(lambda: convert(record, SourceFormat("unpaired"), "f:1", "preferences"))


def test_labels_make_other_ids() -> None:
    first, second = (
        convert({"prompt": "q", "completion": "a", "label": label}, SourceFormat("unpaired"), "f:1", "unpaired")[0]
        for label in (True, False)
    )
    assert isinstance(first, dict) and isinstance(second, dict) and first["id"] != second["id"]
