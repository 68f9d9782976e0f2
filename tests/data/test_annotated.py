"""Annotations as a source of recipes: margins, labels, rewritten answers, counts, and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.recipe.recipe import Recipe
from align.config.stages.inputs import DataConfig
from align.data.builds.build import build
from align.data.rows import read_rows
from align.data.sources import identity
from align.stages.data import identities
from align.store.annotations import AnnotationSet, Answer, AnswerWriter, Pair, now, pair_id
from tests.support.refusals import Refused

SOURCE = {"type": "annotations", "set": "helpful-1", "license": "CC0-1.0"}
VERDICTS = {2: "much_better", 1: "better", 0: "tie"}


@pytest.fixture
def annotations(tmp_path: Path) -> AnnotationSet:
    return AnnotationSet(tmp_path / "store", "helpful-1")


def add(annotations: AnnotationSet, question: str, values: list[Any], **fields: Any) -> Pair:
    """Add a pair and a verdict of each annotator: 2 to -2, ``bad``, or a fields' dictionary."""
    prompt = [{"role": "user", "content": question}]
    pair = Pair(id=pair_id(prompt, "yes", "no"), prompt=prompt, a="yes", b="no", **fields)
    annotations.add_pairs([pair])
    for number, value in enumerate(values):
        answer: dict[str, Any] = {"verdict": "both_bad", "preferred": None}
        if value != "bad":
            preferred = None if value == 0 else ("a" if value > 0 else "b")
            answer = {"verdict": VERDICTS[abs(value)], "preferred": preferred}
        write(annotations, pair, f"ann{number}", **answer)
    return pair


def write(annotations: AnnotationSet, pair: Pair, annotator: str, **fields: Any) -> Answer:
    stamp = now()
    entry = Answer(id=f"{stamp}{annotator}", pair=pair.id, annotator=annotator, time=stamp, left="a", **fields)
    AnswerWriter(annotations, annotator).write(entry)
    return entry


def make(tmp_path: Path, kind: str, **source: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the ledger and the rows of a build with one source of annotations."""
    content = {"kind": kind, "sources": [SOURCE | source], "test_size": 0, "near_duplicate_prompts": None}
    recipe = Recipe.model_validate(content)
    output = tmp_path / f"out-{kind}"
    output.mkdir()
    ledger = build(recipe, tmp_path, tmp_path / "work", output)
    return ledger, read_rows(output / "train.parquet")


def test_preferences_have_the_mean_margin_and_count_the_rest(annotations: AnnotationSet, tmp_path: Path) -> None:
    add(annotations, "clear", [2])
    add(annotations, "mean", [2, -1])
    add(annotations, "worse", [-1, -1])
    add(annotations, "tie", [0])
    add(annotations, "bad", ["bad"])
    add(annotations, "split", [1, -1])
    add(annotations, "gold", [2], gold="a")
    add(annotations, "open", [])
    ledger, rows = make(tmp_path, "preferences")
    by_prompt = {row["prompt"][0]["content"]: row for row in rows}
    assert {name: row["chosen"][0]["content"] for name, row in by_prompt.items()} == {
        "clear": "yes",
        "mean": "yes",
        "worse": "no",
    }
    margins = {name: row["chosen_score"] - row["rejected_score"] for name, row in by_prompt.items()}
    assert margins == {"clear": 2.0, "mean": 0.5, "worse": 1.0}
    assert ledger["rows_in"] == 7
    assert ledger["dropped"] == {"a gold question": 1, "a tie": 1, "annotators disagree": 1, "both answers are bad": 1}


def test_unpaired_rows_label_both_answers(annotations: AnnotationSet, tmp_path: Path) -> None:
    add(annotations, "clear", [1])
    add(annotations, "bad", ["bad", "bad", 1])
    add(annotations, "tie", [0])
    ledger, rows = make(tmp_path, "unpaired")
    labels = {(row["prompt"][0]["content"], row["completion"][0]["content"]): row["label"] for row in rows}
    assert labels == {("clear", "yes"): True, ("clear", "no"): False, ("bad", "yes"): False, ("bad", "no"): False}
    assert ledger["dropped"] == {"a tie": 1}


def test_rewritten_answers_become_instructions(annotations: AnnotationSet, tmp_path: Path) -> None:
    pair = add(annotations, "q", [])
    write(annotations, pair, "ann", verdict="both_bad", rewrite="Better.")
    write(annotations, pair, "bob", verdict="tie", rewrite="Better.")
    add(annotations, "none", [1])
    ledger, rows = make(tmp_path, "instructions")
    assert [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows] == [("q", "Better.")]
    assert ledger["dropped"] == {"no rewritten answer": 1}


def test_only_first_answers_of_named_annotators_count(annotations: AnnotationSet, tmp_path: Path) -> None:
    pair = add(annotations, "q", [1, -2])
    write(annotations, pair, "ann0", verdict="much_better", preferred="b", repeat=True)
    ledger, rows = make(tmp_path, "preferences", annotators=["ann0"])
    assert [row["chosen"][0]["content"] for row in rows] == ["yes"]
    (line,) = ledger["sources"]
    # The ledger says who and when.
    assert list(line["annotators"]) == ["ann0"]
    assert line["annotators"]["ann0"]["answers"] == 2
    assert line["annotators"]["ann0"]["first"] <= line["annotators"]["ann0"]["last"] <= now()


def test_key_follows_the_journal_and_not_its_place(
    refused: Refused, annotations: AnnotationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = add(annotations, "q", [1])
    (tmp_path / "recipe.yaml").write_text("kind: preferences\nsources: [{type: annotations, set: helpful-1}]\n")
    config = DataConfig(recipe="recipe.yaml")
    before = identities(config, tmp_path)
    (tmp_path / "store").rename(tmp_path / "moved")
    refused(identities, config, tmp_path)
    monkeypatch.setenv("ALIGN_STORE", str(tmp_path / "moved"))
    assert identities(config, tmp_path) == before
    named = "kind: preferences\nsources: [{type: annotations, set: helpful-1, store: moved}]\n"
    monkeypatch.setenv("ALIGN_STORE", "s3://bucket/prefix")
    (tmp_path / "recipe.yaml").write_text(named)
    assert identities(config, tmp_path) == before
    write(AnnotationSet(tmp_path / "moved", "helpful-1"), pair, "bob", verdict="tie")
    assert identities(config, tmp_path) != before


def test_set_without_answers_and_unknown_names_are_refused(
    refused: Refused, annotations: AnnotationSet, tmp_path: Path
) -> None:
    add(annotations, "q", [])
    refused(make, tmp_path, "preferences")
    add(annotations, "r", [1])
    refused(make, tmp_path / ".", "instructions", annotators=["bob"])


def test_identity_is_the_digest_of_the_set(annotations: AnnotationSet, tmp_path: Path) -> None:
    add(annotations, "q", [1])
    source = Recipe.model_validate({"kind": "preferences", "sources": [SOURCE]}).sources[0]
    assert identity(source, tmp_path) == {"annotations helpful-1": annotations.content_digest()}
