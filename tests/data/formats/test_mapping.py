"""Records mapped without Python: columns, labels of the better answer, groups, choices, and columns that stay."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from align.config.recipe.record_mapping import (
    ComparedColumns,
    Constant,
    GroupedRows,
    LabelWords,
    Mean,
    RecordMapping,
)
from align.config.validation import validate_plain
from align.data.formats import FieldUsage, SourceFormat, convert, detect
from align.data.formats.columns import LabelRule, label_rule
from align.data.formats.mapping import group_records
from align.data.rows import BadRecord, assistant, user
from tests.support.data.formats.conversions import chat, dropped, row, rows, source_format
from tests.support.refusals import Refused


def test_columns_are_templates_over_any_fields() -> None:
    record = {"q": "2 + 2?", "rationale": "Count.", "final": {"values": [4]}, "question": "another", "answer": "other"}
    columns = {"prompt": "q", "completion": "{rationale}\n#### {final.values[0]}"}
    found = row(record, "prompt_completion", columns=columns)
    assert (found["prompt"], found["completion"]) == (chat("2 + 2?"), [assistant("Count.\n#### 4")])


def test_fields_that_a_mapping_uses_or_hides_are_told_apart(refused: Refused) -> None:
    usage = FieldUsage()
    record = {"q": "a", "prompt": "other", "options": ["x", "y"], "level": 3, "answer": "b"}
    columns = {"prompt": "{q} {options[0]} or {options[1]}?", "completion": "answer"}
    convert(record, source_format("prompt_completion", columns=columns), "f:1", "instructions", usage=usage)
    assert usage.unused == {"prompt": 1, "level": 1}
    # without the template the choices would be lost
    refused(lambda: convert(record, source_format("prompt_completion", columns={"prompt": "q"}), "f:1", "instructions"))


def test_missing_column_is_not_replaced_by_another(refused: Refused) -> None:
    form = source_format("prompt_completion", columns={"prompt": "ask"})
    refused(convert, {"question": "something else", "completion": "a"}, form, "f:1", "instructions")


def test_a_system_prompt_is_a_text_that_may_quote_columns() -> None:
    record = {"prompt": "q", "completion": "a", "persona": "a pirate"}
    system = {"role": "system", "content": "You are a pirate."}
    assert row(record, "prompt_completion", system="You are {persona}.")["prompt"] == [system, user("q")]
    own = {"messages": [{"role": "system", "content": "Own."}, *chat("q", "a")]}
    assert row(own, "messages", system="Given.")["prompt"][0]["content"] == "Own."


# Kept columns


def test_kept_columns_stay_with_every_row_of_a_record() -> None:
    record = {"question": "q", "answer": "1 #### 2", "level": 3, "tags": ["a", {"b": None}], "day": None}
    found = row(record, "gsm8k", keep=["answer", "level", "tags", "day"])
    assert {name: found.get(name) for name in ("answer", "level", "tags", "day")} == {
        "answer": "1 #### 2",
        "level": 3,
        "tags": ["a", {"b": None}],
        "day": None,
    }
    assert found["checks"] == '{"answer": "2"}'
    several = {"messages": chat("a", "b", "c", "d"), "gold": 1.5}
    assert [item["gold"] for item in rows(several, "messages", turns="all", keep=["gold"])] == [1.5, 1.5]


def test_keep_all_leaves_out_what_the_format_reads_itself(refused: Refused) -> None:
    record = {"ask": "q", "completion": "a", "gold": 4, "why": "b", "label": "x"}
    kept = row(record, "prompt_completion", columns={"prompt": "ask"}, keep={"kind": "label", "both": "{gold} {why}"})
    assert (kept["kind"], kept["both"], "gold" in kept) == ("x", "4 b", False)
    del record["label"]
    kept = row(record, "prompt_completion", columns={"prompt": "ask"}, keep="all")
    assert set(kept) == {"prompt", "completion", "checks", "gold", "why"}
    refused(row, {"prompt": "q", "completion": "a", "gold": 1, "source": "web"}, "prompt_completion", keep="all")


def test_a_kept_column_is_named_as_such_and_is_no_loss(refused: Refused) -> None:
    usage = FieldUsage()
    record = {"prompt": "q", "completion": "a", "choices": ["x"], "note": "n", "images": ["x.png"]}
    form = source_format("prompt_completion", keep=["choices"], ignore=["images"])
    convert(record, form, "f:1", "instructions", usage=usage)
    assert (usage.kept, usage.unused) == ({"choices": 1}, {"note": 1, "images": 1})
    del record["choices"]
    refused(lambda: convert(record, source_format("prompt_completion", keep="all"), "f:1", "instructions"))
    refused(row, {"prompt": "q", "completion": "a", "raw": b"x"}, "prompt_completion", keep=["raw"])


def test_checks_of_a_record_survive() -> None:
    record = {"prompt": "q", "completion": "a", "checks": {"answer": 7}}
    assert row(record, "prompt_completion")["checks"] == '{"answer": 7}'
    assert row(record | {"checks": '{"answer": "é"}'}, "prompt_completion")["checks"] == '{"answer": "é"}'
    assert row(record | {"checks": "three of them"}, "prompt_completion")["checks"] == ""


def test_rows_of_a_file_are_read_with_all_their_columns(refused: Refused) -> None:
    own = {"prompt": chat("q"), "completion": [assistant("a")], "checks": '{"answer": "1"}', "gold": [1], "id": "mine"}
    (found,) = convert(own, SourceFormat("rows"), "f:1", "instructions")
    assert found == own
    (found,) = convert({**own, "text": None}, SourceFormat("rows"), "f:1", "texts")
    assert isinstance(found, dict) and (found["text"], found["gold"]) == ("q\n\na", [1])
    for wrong in (
        {"prompt": "q"},
        {"prompt": [{"role": "human", "content": "q"}]},
        {"prompt": chat("q"), "checks": 3},
        {"prompt": chat("q"), "_split": "x"},
    ):
        refused(convert, wrong, SourceFormat("rows"), "f:1", "prompts")


# The better of two columns


def compared(**settings: Any) -> ComparedColumns:
    return ComparedColumns(**{"label": "w", "a": "output_1", "b": "output_2", **settings})


@pytest.mark.parametrize(
    ("settings", "labels", "prefers_a", "prefers_b", "tie"),
    [
        ({}, ["model_a", "model_b", "tie"], "Model_A", "model_b", "tie (bothbad)"),  # Chatbot Arena
        ({}, [1, 2, 1], 1, 2, None),  # LLMBar
        ({"a": "x", "b": "y"}, [0, 1, 2], "1", 2.0, 0),  # PandaLM
        ({"a": "response1", "b": "response2"}, [-2, 3, 0, 1], -1, 3, 0),  # HelpSteer3
        ({"a": "response_0", "b": "response_1"}, [0, 1], 0, 1, None),  # PKU-SafeRLHF
        ({"a": "human_ref_A", "b": "human_ref_B", "a_is": 1, "b_is": 0}, [0, 1], 1, 0, "tie"),  # SHP
        ({}, ["output_1", "output_2"], "output_1", "OUTPUT_2", "equal"),
        ({"a_is": ["safe", "ok"], "b_is": "bad"}, ["safe"], "OK", "bad", "both"),
    ],
)
def test_a_label_names_the_better_column(
    settings: dict[str, Any], labels: list[Any], prefers_a: Any, prefers_b: Any, tie: Any
) -> None:
    better = compared(**settings)
    rule = label_rule(better, [{"w": label} for label in labels], "data")
    form = SourceFormat("preferences", mapping=RecordMapping(better=better), rule=rule)
    record = {"prompt": "q", better.a: "first", better.b: "second"}
    for label, chosen in ((prefers_a, "first"), (prefers_b, "second")):
        (found,) = convert({**record, "w": label}, form, "f:1", "preferences")
        assert isinstance(found, dict) and found["chosen"] == [assistant(chosen)]
    if tie is not None:
        (found,) = convert({**record, "w": tie}, form, "f:1", "preferences")
        assert not isinstance(found, dict) and found.reason == "tie"


def test_a_label_that_could_mean_either_must_be_named(refused: Refused) -> None:
    refused(lambda: label_rule(compared(a="human_ref_A", b="human_ref_B"), [{"w": 1}, {"w": 0}], "data"))
    form = SourceFormat("preferences", mapping=RecordMapping(better=compared()), rule=LabelRule())
    refused(convert, {"prompt": "q", "output_1": "a", "output_2": "b", "w": "left-ish"}, form, "f:1", "preferences")
    stops = SourceFormat("preferences", mapping=RecordMapping(better=compared(tie="stop")), rule=LabelRule())
    refused(convert, {"prompt": "q", "output_1": "a", "output_2": "b", "w": "tie"}, stops, "f:1", "preferences")


# Groups


def test_answers_of_one_prompt_are_joined() -> None:
    lines = [
        ("f:1", {"prompt": "p", "response": "a", "help": 4, "right": 1, "level": 1}),
        ("f:2", {"prompt": "q", "response": "c", "help": 1, "right": 0, "level": 2}),
        ("f:3", {"prompt": "p", "response": "b", "help": 2, "right": "1", "level": 2}),
        ("f:4", {"prompt": "q", "response": "d", "help": "much", "right": 0, "level": 2}),
    ]

    def joined(**settings: Any) -> list[Any]:
        return list(group_records(GroupedRows(by="prompt", answer="response", **settings), iter(lines)))

    bad, first, second = joined(score={"help": 0.5, "right": 2})
    assert str(bad) == "f:4: 'help' holds 'much', expected a number."
    assert first == (
        "f:1",
        {"prompt": "p", "responses": [{"content": "a", "score": 4.0}, {"content": "b", "score": 3.0}]},
    )
    assert second[1]["level"] == 2  # shared by all of its records
    ranked: Iterator[Any] = iter(joined(rank="right"))
    (found,) = convert(next(ranked)[1], SourceFormat("ranked"), "f:1", "preferences")
    assert isinstance(found, dict) and [item["rank"] for item in found["responses"]] == [0, 0]


# Labels in words, and means of lists


def test_labels_in_words_become_truth_values(refused: Refused) -> None:
    words = LabelWords(good=["yes", "thumbs_up", 5], bad="no")
    columns = {"label": words}
    for label, expected in (("Yes ", True), ("thumbs_up", True), (5.0, True), ("NO", False)):
        record = {"prompt": "q", "completion": "a", "label": label}
        assert row(record, "unpaired", "unpaired", columns=columns)["label"] is expected
    named = {"label": LabelWords(column="{vote.word}", good=["up"], bad=["down"])}
    record = {"prompt": "q", "completion": "a", "vote": {"word": "down"}}
    assert row(record, "unpaired", "unpaired", columns=named)["label"] is False
    refused(
        lambda: convert(
            {"prompt": "q", "completion": "a", "label": "maybe"},
            source_format("unpaired", columns=columns),
            "f:1",
            "unpaired",
        )
    )


def test_mapping_of_words_and_means_is_read_from_yaml() -> None:
    mapping = validate_plain(
        RecordMapping, {"columns": {"label": {"good": ["yes"], "bad": ["no"]}, "scores": {"mean": "ratings"}}}
    )
    assert mapping.columns == {"label": LabelWords(good=["yes"], bad=["no"]), "scores": Mean(mean="ratings")}


def test_ratings_count_by_their_mean() -> None:
    record = {"prompt": "q", "responses": ["a", "b"], "ratings": [[4, 5, None], ["1", 2]]}
    found = row(record, "scored", "preferences", columns={"scores": Mean(mean="ratings")})
    assert [item["score"] for item in found["responses"]] == [4.5, 1.5]
    grouped = GroupedRows(by="q", answer="a", score=Mean(mean="votes"))
    records = [("f:1", {"q": "x", "a": "one", "votes": "[1, 2]"}), ("f:2", {"q": "x", "a": "two", "votes": [3.0]})]
    ((_, joined),) = group_records(grouped, iter(records))  # type: ignore[misc]
    assert [item["score"] for item in joined["responses"]] == [1.5, 3.0]
    (bad,) = [item for item in group_records(grouped, iter([("f:1", {"q": "x", "a": "b", "votes": ["high"]})]))
              if isinstance(item, BadRecord)]  # fmt: skip
    assert "'votes' has 'high' in its list, expected numbers" in bad.problem


def test_json_truth_value_is_an_answer_in_words(refused: Refused) -> None:
    settings = {"columns": {"completion": {"column": "answer", "words": {True: "Yes.", False: "No."}}}}
    columns = validate_plain(RecordMapping, settings).columns
    for answer, words in ((True, "Yes."), (False, "No."), ("TRUE", "Yes.")):
        record = {"question": "Is it so?", "answer": answer}
        assert row(record, "prompt_completion", columns=columns)["completion"] == [assistant(words)]
    refused(
        lambda: convert(
            {"question": "q", "answer": 1}, source_format("prompt_completion", columns=columns), "f:1", "prompts"
        )
    )


# Multiple choice


@pytest.mark.parametrize(
    ("record", "options"),
    [
        ({"question": "Capital?", "choices": ["Rome", "Paris"], "answer": 1}, {}),
        ({"question": "Capital?", "options": ["Rome", "Paris"], "answer": "B"}, {}),
        ({"question": "Capital?", "choices": '["Rome", "Paris"]', "answer": "Paris"}, {}),
        ({"question": "Capital?", "A": "Rome", "B": "Paris", "answer": "(b)"}, {}),
        ({"question": "Capital?", "choices": {"text": ["Rome", "Paris"], "label": ["1", "2"]}, "answerKey": "2"}, {}),
        ({"question": "Capital?", "options": {"X": "Rome", "Y": "Paris"}, "key": "Y"}, {}),
        ({"question": "Capital?", "endings": ["Rome", "Paris"], "label": "1"}, {"first_choice": 0}),
        ({"question": "Capital?", "choices": ["Rome", "Paris"], "answer": 2}, {"first_choice": 1}),
        ({"question": "Capital?", "choice0": "Rome", "choice1": "Paris", "answer": "1"}, {}),
        ({"question": "Capital?", "choice_a": "Rome", "choice_b": "Paris", "answer": "b"}, {}),
        ({"question": "Capital?", "Option 1": "Rome", "Option 2": "Paris", "answer": 2}, {}),
        ({"question": "Capital?", "option1": "Rome", "option2": "Paris", "answer": 1}, {"first_choice": 0}),
        ({"question": "Capital?", "ending0": "Rome", "ending1": "Paris", "ending2": None, "label": 1}, {}),
        ({"question": "Capital?", "opa": "Rome", "opb": "Paris", "answer": "B"}, {}),
        ({"question": "Capital?", "answer_choices": ["Rome", "Paris"], "answer": "B"}, {}),
    ],
)
def test_multiple_choice_becomes_prompts_answers_and_pairs(record: dict[str, Any], options: dict[str, Any]) -> None:
    assert detect([record], "prompts").form == "multiple_choice"
    found = row(record, "multiple_choice", **options)
    assert found["prompt"] == [user("Capital?\n\nA. Rome\nB. Paris")]
    assert found["completion"] == [assistant("B. Paris")]
    assert json.loads(found["checks"]) == {"answer": "B", "text": "Paris"}
    compared = row(record, "multiple_choice", "preferences", **options)
    assert [(item["content"], item["score"]) for item in compared["responses"]] == [("A. Rome", 0.0), ("B. Paris", 1.0)]
    assert row(record, "multiple_choice", choice_reply="letter", **options)["completion"] == [assistant("B")]


def test_choices_come_from_columns_or_are_the_same_everywhere() -> None:
    goal = {"goal": "Open it.", "sol1": "Push.", "sol2": "Pull.", "gold": 1}
    columns = {"question": "goal", "choices": ["sol1", "sol2"], "answer": "gold"}
    assert row(goal, "multiple_choice", columns=columns)["completion"] == [assistant("B. Pull.")]
    asked = {"passage": "It is so.", "question": "is it so", "answer": True}
    columns = {"question": "{passage}\n{question}?", "choices": Constant(constant=["no", "yes"])}
    found = row(asked, "multiple_choice", columns=columns)
    assert (
        found["prompt"] == [user("It is so.\nis it so?\n\nA. no\nB. yes")]
        and found["completion"][0]["content"] == "B. yes"
    )


def test_numbered_choice_columns_refuse_other_numbers(refused: Refused) -> None:
    record = {"question": "q", "option1": "x", "option2": "y", "answer": 0}  # numbers count from 0, columns from 1
    refused(lambda: convert(record, SourceFormat("multiple_choice"), "f:1", "prompts"))


@pytest.mark.parametrize(
    "columns",
    [
        {"choice0": "x", "choice1": "y"},
        {"A": "x", "B": "y", "C": "z"},
        {"distractor1": "x", "distractor2": "y"},
        {"answerA": "x", "answerB": "y"},
    ],
)
def test_choices_that_a_format_skips_are_refused(refused: Refused, columns: dict[str, str]) -> None:
    record = {"question": "q", "answer": "x", **columns}
    refused(lambda: convert(record, SourceFormat("prompt_completion"), "f:1", "instructions"))
    kept = list(columns)
    convert(record, source_format("prompt_completion", keep=kept), "f:1", "instructions")
    convert(record, source_format("prompt_completion", ignore=kept), "f:1", "instructions")


def test_columns_that_are_no_choices_stay() -> None:
    sums = {"question": "a + b?", "a": 1, "b": 2, "answer": "3"}
    assert detect([sums], "instructions").form == "prompt_completion"
    one = {"question": "q", "option1": "x", "answer": "3"}
    assert detect([one], "instructions").form == "prompt_completion"


def test_an_answer_that_is_no_choice_is_refused(refused: Refused) -> None:
    record = {"question": "q", "choices": ["a b", "c d"], "answer": 2}
    refused(lambda: convert(record, SourceFormat("multiple_choice"), "f:1", "prompts"))
    for missing in (math.nan, math.inf, None):  # a missing label of JSON lines may be NaN
        refused(convert, {**record, "answer": missing}, SourceFormat("multiple_choice"), "f:1", "prompts")
    refused(lambda: convert({**record, "choices": ["a"]}, SourceFormat("multiple_choice"), "f:1", "prompts"))
    # choices that are left aside on purpose make no multiple choice
    ignored = {"question": "q", "choices": ["a", "b"], "answer": "a"}
    assert detect([ignored], "prompts", ["choices"]).form == "prompt_completion"
    assert dropped({"prompt": "q", "completion": " ", "gold": 1}, "prompt_completion", keep=["gold"]) == "empty reply"
