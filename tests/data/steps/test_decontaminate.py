"""Rows that contain evaluation items: the rule's edges, what is reported, and real sets against real evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.config.recipe.source_settings import FilesSource, HubSource
from align.config.recipe.step_settings import DecontaminateStep, EvaluationSet
from align.data.rows import Row, assistant, user
from align.data.sources import read
from align.data.steps import decontaminate
from align.data.steps.decontaminate import evaluation_set_identities, read_items
from align.data.steps.step import step_identities
from tests.support.data.steps.tables import decide, kept, row
from tests.support.refusals import Refused

WORDS = [f"w{number}" for number in range(20)]


def item(begin: int = 0, end: int = 20) -> str:
    return " ".join(WORDS[begin:end])


def write(folder: Path, **sets: list[str]) -> list[EvaluationSet]:
    for name, questions in sets.items():
        lines = [json.dumps({"prompt": question}) for question in questions]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [EvaluationSet(name=name, files=[f"{name}.jsonl"]) for name in sets]


def step(sets: list[EvaluationSet], **inputs: Any) -> DecontaminateStep:
    return DecontaminateStep(type="decontaminate", sets=sets, **inputs)


def test_more_than_half_of_the_words_in_shared_runs(tmp_path: Path) -> None:
    sets = write(tmp_path, mine=[item()])
    rows = [
        row("so: " + item(3, 14) + " and more"),  # 11 of 20 words: contained
        row(item(3, 13) + " else"),  # 10 of 20, exactly half: not contained
        row(item(0, 7) + " x " + item(8, 15) + " x " + item(13, 20)),  # no run of 8, but a copy with changed words
        row(item(0, 8) + " x " + item(12, 20)),  # 8 and 8 in one row: 16 of 20
        row(item(0, 8)),  # each half of it is in
        row(item(12, 20)),  # another row: 8 of 20 each
        row("Something else", item()),  # in the reply
    ]
    verdict = decide(step(sets, of="user"), rows, base=tmp_path)
    assert kept(verdict) == [1, 4, 5, 6]
    assert verdict.reasons == ["contains an item of mine"]
    assert verdict.details[0] == {"set": "mine", "item": "mine.jsonl:1", "coverage": 0.55, "excerpt": item()}
    assert verdict.details[3]["coverage"] == 0.8
    assert sorted(verdict.details) == [0, 2, 3]
    assert kept(decide(step(sets), rows, base=tmp_path)) == [1, 4, 5]
    assert kept(decide(step(sets, coverage=0.0), rows, base=tmp_path)) == []  # any shared run is a hit
    assert kept(decide(step(sets, ngram=12), rows, base=tmp_path)) == [0, 1, 3, 4, 5]


LEAKS = {
    "alone": lambda item: row(item),
    "in an earlier turn": lambda item: {**row("x"), "prompt": [user(item), assistant("Yes."), user("and?")]},
    "with choices": lambda item: row(f"Question: {item}\nA. red\nB. blue\nAnswer:"),
    "behind a sentence": lambda item: row(f"Answer this. {item} Think first."),
    "in a reply": lambda item: row("Write a question.", f"Sure! Here it is:\n\n1) {item}\n2) Who came first?"),
    "in a reply, quoted": lambda item: row("Write a question.", f'How about "{item}" Or is that too easy?'),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("question", ["What is LSD?", "The plague was caused by", "Who wrote the first novel in prose"])
def test_short_items_are_found_wherever_they_leak(leak: str, question: str, tmp_path: Path) -> None:
    sets = write(tmp_path, mine=[question])
    assert kept(decide(step(sets), [LEAKS[leak](question), row("clean")], base=tmp_path)) == [1]


def test_short_items_are_not_found_by_chance(tmp_path: Path) -> None:
    sets = write(tmp_path, mine=["What do you do?", "Never.", "Blue whale"])
    rows = [
        row("What do you do when the engine of your car stops?"),
        row("Tell me what do you do, and why."),
        row("Is it so?", "Never. It is a blue whale."),
        row("Never"),
    ]
    assert kept(decide(step(sets), rows, base=tmp_path)) == [0, 1, 2]


def test_equal_items_count_each_and_are_one_hit(tmp_path: Path) -> None:
    sets = write(tmp_path, mine=["Which of these is true?"] * 30 + ["something else entirely, is it not?"])
    verdict = decide(step(sets), [row("which of these is TRUE")], base=tmp_path)
    assert verdict.notes["sets"]["mine"] == {
        "items": 31, "items_hit": 30, "share": 0.9677, "rows": 1, "contaminated": True
    }  # fmt: skip
    assert "others" not in verdict.details[0]


def test_turns_of_an_item_are_looked_for_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "mt.jsonl").write_text(json.dumps({"turns": [item(0, 9), item(9, 20) + " again " * 20]}))
    verdict = decide(step([EvaluationSet(name="mt", files=["mt.jsonl"])]), [row(item(0, 9))], base=tmp_path)
    assert verdict.details[0]["coverage"] == 1.0
    assert verdict.notes["sets"]["mt"]["items_hit"] == 1
    (tmp_path / "mt.jsonl").write_text(json.dumps({"turns": [item(0, 10) + " x" * 8, item(0, 10), item(0, 10) + " y"]}))
    verdict = decide(step([EvaluationSet(name="mt", files=["mt.jsonl"])]), [row(item(0, 10))], base=tmp_path)
    assert verdict.details[0]["coverage"] == 1.0 and "others" not in verdict.details[0]  # the turn most covered


def test_notes_count_items_and_rows_of_each_set(tmp_path: Path) -> None:
    others = [" ".join(f"{letter}{number}" for number in range(10)) for letter in "abcdefgh"]
    sets = write(tmp_path, one=[item(), *others], two=["short one", *[f"another {i}" for i in range(199)]], three=["z"])
    rows = [row(item()), row(item() + " again"), row("short one"), row(others[0] + " " + others[1]), row("clean")]
    verdict = decide(step(sets), rows, base=tmp_path)
    assert kept(verdict) == [4]
    assert verdict.notes["sets"] == {
        "one": {"items": 9, "items_hit": 3, "share": 0.3333, "rows": 3, "contaminated": True},
        "two": {"items": 200, "items_hit": 1, "share": 0.005, "rows": 1, "contaminated": False},
        "three": {"items": 1, "items_hit": 0, "share": 0.0, "rows": 0, "contaminated": False},
    }
    assert [verdict.reasons[code] for code in verdict.code[[0, 2]]] == [
        "contains an item of one",
        "contains an item of two",
    ]
    assert [hit["item"] for hit in verdict.details[3]["others"]] == ["one.jsonl:3"]
    json.dumps([verdict.notes, verdict.details])


def test_most_covered_item_names_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = write(tmp_path, less=[item(0, 12) + " v0 v1 v2"], most=[item()])
    verdict = decide(step(sets), [row(item())], base=tmp_path)
    assert verdict.details[0]["set"] == "most"
    assert verdict.details[0]["others"] == [{"set": "less", "item": "less.jsonl:1", "coverage": 0.8}]
    monkeypatch.setattr(decontaminate, "MOST", 1)
    notes = decide(step(sets), [row(item())], base=tmp_path).notes
    assert notes["rows_with_more_than_1_items"] == 1
    assert notes["sets"]["less"]["items_hit"] == 0


def test_reporting_keeps_the_rows_and_names_the_hits(tmp_path: Path) -> None:
    sets = write(tmp_path, mine=[item()])
    rows = [row("clean"), row(item())]
    verdict = decide(step(sets, action="report"), rows, base=tmp_path)
    assert kept(verdict) == [0, 1] and not verdict.details
    assert verdict.notes["rows"] == 1
    assert verdict.notes["examples"][0]["id"] == rows[1]["id"]
    assert verdict.notes["examples"][0]["set"] == "mine"


def test_dropped_rows_are_no_hits_in_any_sharding(tmp_path: Path) -> None:
    sets = write(tmp_path, mine=[item(), "short"])
    rows = [row(text) for text in (item(), "short", "x", item(2, 20), "short")]
    verdict = decide(step(sets), rows, base=tmp_path, alive=[False, True, True, True, True])
    assert verdict.code.tolist() == [-1, 0, -1, 0, 0]
    decisions = decide(step(sets), rows, base=tmp_path)
    for cut in (1, 2, 4):
        parted = decide(step(sets), rows, base=tmp_path, cut=cut)
        assert np.array_equal(parted.code, decisions.code)
        assert (parted.notes, parted.details) == (decisions.notes, decisions.details)


def test_decontaminate_refuses_bad_settings(refused: Refused, tmp_path: Path) -> None:
    sets = write(tmp_path, mine=["a"])
    refused(step, sets * 2)
    refused(step, sets, coverage=50)
    assert list(step_identities(step(sets), tmp_path)) == ["rules", "mine: mine.jsonl"]


REAL = {
    "ifeval": "ifeval/input_data.jsonl",
    "mt_bench": "mt-bench/question.jsonl",
    "truthfulqa": "truthfulqa/TruthfulQA.csv",
    "xstest": "xstest/xstest_prompts.csv",
    "arc_easy": "arc/ARC-Easy.test.json",
}


def real_rows(folder: Path, file: str, question: str, more: str = "") -> list[Row]:
    records = [result for result in read(FilesSource(type="files", paths=[file]), folder) if isinstance(result, tuple)]
    return [row("\n".join(filter(None, [record[question], record.get(more, "")]))) for _, record in records]


@pytest.mark.parametrize(
    "file, question, more, hits",
    [
        (
            "dolly-3k/dolly_3k.json",
            "instruction",
            "input",
            {"ifeval": 1, "xstest": 1},
        ),  # the first lines on World War II; "What is LSD"
        ("gsm8k/train.jsonl", "question", "", {}),
        ("llamafactory-demo/alpaca_en_demo.json", "instruction", "input", {}),
    ],
)
def test_real_sets_against_real_evaluations(
    file: str, question: str, more: str, hits: dict[str, int], shared_data: Path
) -> None:
    sets = [EvaluationSet(name=name, files=[path]) for name, path in REAL.items()]
    rows = real_rows(shared_data, file, question, more)
    notes = decide(step(sets), rows, base=shared_data).notes["sets"]
    assert {name: note["items_hit"] for name, note in notes.items() if note["items_hit"]} == hits
    assert not any(note["contaminated"] for note in notes.values())


def test_the_template_of_a_set_is_no_hit(shared_data: Path) -> None:
    sets = [EvaluationSet(name="arc_easy", files=[REAL["arc_easy"]])]
    rows = real_rows(shared_data, "arc/ARC-Easy.train.json", "instruction")[:600]
    actual = decide(step(sets), rows, base=shared_data).notes["sets"]["arc_easy"]
    assert (actual["items_hit"], actual["rows"]) == (6, 5)  # like the fossils, with the same four answers
    counted = decide(step(sets, template=1.0), rows, base=shared_data).notes["sets"]["arc_easy"]
    assert (counted["items_hit"], counted["rows"]) == (22, 29)  # "Please choose the correct answer to the question"


def test_a_real_item_planted_in_real_rows_is_found(shared_data: Path) -> None:
    sets = [EvaluationSet(name=name, files=[path]) for name, path in REAL.items()]
    rows = real_rows(shared_data, "gsm8k/train.jsonl", "question")[:500]
    planted = json.loads((shared_data / REAL["ifeval"]).read_text(encoding="utf-8").splitlines()[40])["prompt"]
    rows.insert(123, row("Please do this. " + planted.upper()))
    verdict = decide(step(sets), rows, base=shared_data)
    assert np.flatnonzero(verdict.code >= 0).tolist() == [123]
    assert verdict.details[123]["item"] == "input_data.jsonl:41"


REVISION = "0" * 40


def write_set(folder: Path, *records: Any) -> EvaluationSet:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return EvaluationSet(name="mine", files=["set.jsonl"])


def texts(folder: Path, *records: Any, fields: list[str] | None = None) -> list[tuple[str, ...]]:
    settings = write_set(folder, *records).model_copy(update={"fields": fields})
    return [item.texts for item in read_items(settings, folder)]


def test_questions_are_found_by_the_usual_names(tmp_path: Path) -> None:
    records = [
        {"id": 1, "prompt": "a b"},
        {"Question": "c", "Best Answer": "d"},
        {"turns": ["e", "f"]},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "g"}]},
    ]
    assert texts(tmp_path, *records) == [("a b",), ("c",), ("e", "f"), ("g",)]


def test_fields_may_be_named_nested_and_joined(tmp_path: Path) -> None:
    record = {"question": {"stem": "a", "choices": ["x", "y"]}, "more": "b"}
    assert texts(tmp_path, record, fields=["question.stem"]) == [("a",)]
    assert texts(tmp_path, record, fields=["question.stem", "more"]) == [("a\nb",)]
    assert texts(tmp_path, record, fields=["question.choices"]) == [("x", "y")]


def test_items_are_named_by_file_and_line(tmp_path: Path) -> None:
    places = [item.place for item in read_items(write_set(tmp_path, {"prompt": "a"}, {"prompt": "b"}), tmp_path)]
    assert places == ["set.jsonl:1", "set.jsonl:2"]


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ({"stem": "a"}, None),
        ({"prompt": "a"}, ["promt"]),
        ({"prompt": 3}, None),
        ({"prompt": []}, None),
        ({"prompt": "  "}, None),
    ],
)
def test_what_cannot_be_a_question_is_named(
    refused: Refused, record: Any, fields: list[str] | None, tmp_path: Path
) -> None:
    refused(texts, tmp_path, record, fields=fields)


def test_unreadable_and_empty_sets(refused: Refused, tmp_path: Path) -> None:
    settings = write_set(tmp_path)
    refused(read_items, settings, tmp_path)
    (tmp_path / "set.jsonl").write_text("{", encoding="utf-8")
    refused(read_items, settings, tmp_path)
    refused(lambda: read_items(EvaluationSet(name="mine", files=["nope.jsonl"]), tmp_path))


def test_known_names_need_a_commit_only() -> None:
    source = EvaluationSet(name="gsm8k", revision=REVISION).source()
    assert isinstance(source, HubSource)
    assert (source.dataset, source.config, source.split) == ("openai/gsm8k", "main", "test")
    other_source = EvaluationSet(name="gsm8k", dataset="me/own", split="dev", revision=REVISION).source()
    assert isinstance(other_source, HubSource)
    assert (other_source.dataset, other_source.config, other_source.split) == ("me/own", None, "dev")


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "ifval"},
        {"name": "ifeval"},
        {"name": "mine", "dataset": "o/n"},
        {"name": "ifeval", "files": ["a.json"], "revision": REVISION},
    ],
)
def test_evaluation_set_refuses_bad_settings(refused: Refused, settings: dict[str, Any]) -> None:
    refused(EvaluationSet, **settings)


def test_identity_is_the_content_of_the_files_not_their_folder(tmp_path: Path) -> None:
    actual = []
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        settings = step([write_set(tmp_path / name, {"prompt": text})])
        actual.append(evaluation_set_identities(settings, tmp_path / name, None))
    assert actual[0] == actual[1] != actual[2]
    assert list(actual[0]) == ["rules", "mine: set.jsonl"]
    hub = step([EvaluationSet(name="gsm8k", revision=REVISION)])
    assert evaluation_set_identities(hub, tmp_path, None) == {"rules": str(decontaminate.RULES)}


@pytest.mark.parametrize(
    "name, file, count",
    [
        ("ifeval", "ifeval/input_data.jsonl", 541),
        ("truthfulqa", "truthfulqa/TruthfulQA.csv", 817),
    ],
)
def test_real_sets_are_read_whole(name: str, file: str, count: int, shared_data: Path) -> None:
    items = read_items(EvaluationSet(name=name, files=[file]), shared_data)
    assert abs(len(items) - count) <= 30, len(items)
