"""``align data columns``: the columns of a file, and a recipe that really reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli.main import main
from align.config.recipe.recipe import Recipe
from align.data.builds.build import build
from align.pipeline.pipeline import Pipeline
from tests.support.refusals import Refused


def put(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path.name


def show(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, dict[str, Any]]:
    """Return the table and the recipe below it."""
    assert main(["data", "columns", *words]) == 0
    table, _, recipe = capsys.readouterr().out.partition("\n\n")
    return table, yaml.safe_load(recipe)


LONG = "a long answer that nobody takes for a label"
SAFE = [
    {"prompt": f"q{i}", "response_0": LONG, "response_1": f"{LONG} {i}", "better_response_id": i % 2} for i in range(20)
]
ARENA = [
    {
        "winner": ("model_a", "model_b", "tie")[i % 3],
        **{
            f"conversation_{side}": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": side}]
            for side in "ab"
        },
    }
    for i in range(30)
]
HELPSTEER = [{"prompt": f"q{i // 2}", "response": f"r{i}", "helpfulness": i % 3} for i in range(40)]
GOALS = [{"goal": f"open {i}", "sol1": "push", "sol2": f"pull {i}", "label": i % 2} for i in range(20)]
SUMS = [{"ask": f"{i} + 1?", "reply": "so it is", "level": i % 3, "source": "web"} for i in range(20)]
KEPT_SUMS = {
    "columns": {"prompt": "ask", "completion": "reply"},
    "keep": {"level": "level", "record_source": "source"},
}
CHOSEN_GOALS = {
    "format": "multiple_choice",
    "columns": {"question": "goal", "choices": ["sol1", "sol2"], "answer": "label"},
}
HINTED = [{"question": f"q{i}", "better": LONG, "worse": f"{LONG} {i}", "note": None} for i in range(20)]


@pytest.mark.parametrize(
    ("records", "kind", "source"),
    [
        (SAFE, "preferences", {"better": {"label": "better_response_id", "a": "response_0", "b": "response_1"}}),
        (ARENA, "preferences", {"better": {"label": "winner", "a": "conversation_a", "b": "conversation_b"}}),
        (HELPSTEER, "preferences", {"grouped": {"by": "prompt", "answer": "response", "score": "helpfulness"}}),
        (GOALS, "prompts", CHOSEN_GOALS),
        (SUMS, "instructions", KEPT_SUMS),
        (HINTED, "preferences", {"columns": {"prompt": "question", "chosen": "better", "rejected": "worse"}}),
        ([{"turns": [f"a{i}", "b"]} for i in range(20)], "prompts", {"columns": {"prompt": "{turns[0]}"}}),
    ],
)  # fmt: skip
def test_the_recipe_that_is_printed_reads_the_file(
    records: list[dict[str, Any]],
    kind: str,
    source: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    table, recipe = show(capsys, put(tmp_path / "a.jsonl", records))
    assert recipe["kind"] == kind
    assert recipe["sources"] == [{"type": "files", "paths": ["a.jsonl"], **source}]
    assert all(name in table for name in records[0])
    output = tmp_path / "out"
    output.mkdir()
    ledger = build(Recipe.model_validate(recipe), tmp_path, tmp_path / "work", output)
    assert ledger["rows_out"] >= len(records) // 3


def test_columns_have_types_shares_and_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("question,answer,\x1b[31mred\nWhat?,4,\nWhich?,5,\x1b]0;title\x07\n")
    table, recipe = show(capsys, "a.csv")
    assert "\x1b" not in table and "\\x1b[31mred" in table
    (line,) = [line for line in table.splitlines() if line.startswith("\\x1b")]
    assert line.split()[1:3] == ["text", "50%"]
    assert recipe["kind"] == "instructions"
    assert main(["data", "columns", "a.csv", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["columns"][1] == {"name": "answer", "types": {"text": 2}, "filled": 2, "example": "4"}


def test_the_index_that_pandas_writes_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text(",question,answer\n0,What?,4\n1,Which?,5\n")
    table, recipe = show(capsys, "a.csv")
    assert "question" in table and recipe["kind"] == "instructions"


def test_records_under_a_key_and_tables_without_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"examples": [{"input": "q", "target": "(A)"}] * 3}))
    assert main(["data", "columns", "a.json"]) == 0
    assert "The records seem to lie under a key: align data columns ... --records examples" in capsys.readouterr().out
    _, recipe = show(capsys, "a.json", "--records", "examples")
    source = {"type": "files", "paths": ["a.json"], "records": "examples"}
    assert recipe["sources"] == [{**source, "columns": {"prompt": "input", "completion": "target"}}]
    (tmp_path / "b.csv").write_text("What?,one,two,B\nWhich?,three,four,A\n")
    _, recipe = show(capsys, "b.csv", "--header", "question,A,B,answer")
    assert recipe == {
        "kind": "prompts",
        "sources": [{"type": "files", "paths": ["b.csv"], "header": ["question", "A", "B", "answer"]}],
    }
    assert main(["data", "columns", "nothing.csv"]) == 2
    assert "no file matches 'nothing.csv'" in capsys.readouterr().err


def test_records_that_cannot_be_used_are_counted_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = {"role": "assistant", "content": "a"}
    records = [{"messages": [{"role": "user", "content": f"question {i}"}, answer]} for i in range(40)]
    records[7]["messages"][1] = {"role": "assistant", "text": "a"}
    name = put(tmp_path / "a.jsonl", records)
    with (tmp_path / name).open("a") as file:
        file.write("not json\n")
    assert main(["data", "columns", name]) == 0
    printed = capsys.readouterr().out
    assert "# Records that cannot be used: 2; on_error: drop leaves them out. The first: " in printed
    assert "a.jsonl:41: not valid JSON" in printed
    recipe = yaml.safe_load(printed.partition("\n\n")[2])
    output = tmp_path / "out"
    output.mkdir()
    ledger = build(Recipe.model_validate(recipe), tmp_path, tmp_path / "work", output)
    assert recipe["on_error"] == "drop" and ledger["rows_out"] == 39


@pytest.mark.parametrize(
    ("name", "text", "mapping"),
    [
        (
            "votes.csv",
            "task,first,second,vote\nWhat is 2+2?,4,5,first\nSay hi,go away,hi,second\nName it,x,y,tie\n",
            {"columns": {"prompt": "task"}, "better": {"label": "vote", "a": "first", "b": "second"}},
        ),
        (
            "pandalm.csv",
            "instruction,input,response1,response2,annotator1\nDo,now,yes,no,1\nGo,,ok,nah,2\nHop,,a,b,0\nSit,,c,d,2\n",
            {"better": {"label": "annotator1", "a": "response1", "b": "response2"}},
        ),
        (
            "evals.csv",
            "question,answer_matching_behavior,answer_not_matching_behavior\nDo you?,(A),(B)\nWill you?,(B),(A)\n",
            {
                "columns": {
                    "prompt": "question",
                    "chosen": "answer_matching_behavior",
                    "rejected": "answer_not_matching_behavior",
                }
            },
        ),
        (
            "judged.csv",
            "question,model_x,model_y,winner\nWhy?,because,so,model_x\nHow?,thus,well,model_y\n",
            {"better": {"label": "winner", "a": "model_x", "b": "model_y"}},
        ),
    ],
)
def test_votes_are_suggested_as_better(
    name: str,
    text: str,
    mapping: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    _, recipe = show(capsys, name)
    (source,) = recipe["sources"]
    assert recipe["kind"] == "preferences"
    assert {key: source[key] for key in ("columns", "better") if key in source} == mapping


def test_plan_answers_a_file_of_votes_with_its_mapping(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "votes.csv").write_text("task,first,second,vote\nWhat?,4,5,first\nSay hi,go away,hi,second\n")
    stages = {"data": {"dataset": str(tmp_path / "votes.csv")}}
    refused(Pipeline, {"name": "p", "stages": stages}, "p.yaml")
    stages["data"]["columns"] = {"better": {"label": "vote", "a": "first", "b": "second"}}  # type: ignore[assignment]
    refused(Pipeline, {"name": "p", "stages": stages}, "p.yaml")


def test_pairs_that_were_read_as_prompts_get_their_mapping(refused: Refused, tmp_path: Path) -> None:
    lines = "question,answer_matching_behavior,answer_not_matching_behavior\nDo you?,(A),(B)\nWill you?,(B),(A)\n"
    (tmp_path / "evals.csv").write_text(lines)
    stages = {
        "model": {"source": "smollm2-135m-instruct"},
        "data": {"dataset": str(tmp_path / "evals.csv")},
        "dpo": {"policy": "model", "data": "data", "learning_rate": 1e-4},
    }
    refused(Pipeline, {"name": "p", "stages": stages}, "p.yaml")
