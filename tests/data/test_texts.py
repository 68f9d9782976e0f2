"""Plain texts: read from files of every kind, cleaned, deduplicated and split as rows with turns are."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from align import Pipeline
from align.cli.main import main
from align.config.recipe.recipe import load_recipe
from align.data.builds.build import build
from align.data.builds.diff import compare
from align.data.formats import SourceFormat, convert
from align.data.rows import Dropped, read_rows, row_id
from align.data.steps.split import divide_text
from align.store.artifacts import Kind
from tests.support.refusals import Refused

WORDS = [
    f"{one}{two}" for one in ("riv", "ston", "lant", "harb", "mead", "cop", "wint") for two in ("er", "ing", "el", "ow")
]


def document(number: int) -> str:
    """Twelve lines that no other number's document shares."""
    chance = random.Random(number)
    return "\n".join(f"The {' '.join(chance.choices(WORDS, k=4))} {chance.randrange(10**6)}." for _ in range(12))


def built(folder: Path, recipe: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"kind": "texts", **recipe}))
    output = folder / "built"
    output.mkdir(exist_ok=True)
    ledger = build(load_recipe("recipe.yaml", folder), folder, folder / "work", output)
    (output / "ledger.json").write_text(json.dumps(ledger))
    return output, ledger


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return read_rows(folder / f"{split}.parquet")


@pytest.mark.usefixtures("stages_in_process")
def test_files_of_every_kind_make_one_dataset(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(document(1), encoding="utf-8-sig")
    (tmp_path / "notes.md").write_text(document(2))
    with gzip.open(tmp_path / "old.txt.gz", "wt") as file:
        file.write(document(3))
    lines = [{"text": document(n), "url": "x"} for n in range(10, 30)] + [{"text": "  "}]
    (tmp_path / "web.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pq.write_table(pa.table({"content": [document(n) for n in range(40, 60)]}), tmp_path / "wiki.parquet")
    names = ("book.txt", "notes.md", "old.txt.gz", "web.jsonl", "wiki.parquet")
    sources = [{"type": "files", "name": name, "paths": [str(tmp_path / name)]} for name in names]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"kind": "texts", "sources": sources, "test_size": 0.3}))
    raw = {"name": "texts", "stages": {"data": {"recipe": str(tmp_path / "recipe.yaml")}}}
    artifact = Pipeline(raw).run(store=tmp_path / "store").artifacts["data"]
    assert artifact.kind == Kind.TEXTS
    folder, ledger = artifact.path, json.loads((artifact.path / "ledger.json").read_text())
    rows = rows_of(folder, "train") + rows_of(folder, "test")
    assert {row["text"] for row in rows} == {document(n) for n in (1, 2, 3, *range(10, 30), *range(40, 60))}
    assert all(row.keys() == {"id", "source", "text"} and row["id"] == row_id(row) for row in rows)
    assert ledger["dropped"] == {"empty text": 1}
    assert min(ledger["splits"].values()) > 5
    assert "text" in ledger["format_choices"]["web.jsonl"]
    assert "`text`: a document" in (folder / "README.md").read_text()
    assert document(3).split("\n")[0] in (folder / "preview.html").read_text()


def test_texts_are_cleaned_deduplicated_and_kept_apart(tmp_path: Path) -> None:
    near = document(5).replace("winter", "summer") + " Nearly."
    rows = [document(4).upper(), near, "Ring!\u200b \r\nTwice.  ", "spam " * 80]
    rows += ["As an AI language model, I cannot. " + document(99), "See www.spam.example/now for more. " + document(98)]
    texts = [document(n) for n in range(60)] + rows
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    steps = [
        {"type": "normalize"},
        {"type": "filter", "urls": "strip", "boilerplate": {}, "repetition": {}, "words": {"min": 2}},
        {"type": "exact_duplicates"},
        {"type": "near_duplicates"},
    ]
    sources = [{"type": "files", "paths": [str(tmp_path / "a.jsonl")]}]
    folder, ledger = built(tmp_path, {"sources": sources, "steps": steps, "test_size": 0.3})
    actual = {split: {row["text"] for row in rows_of(folder, split)} for split in ("train", "test")}
    everything = actual["train"] | actual["test"]
    assert "Ring!\nTwice." in everything
    assert "See for more. " + document(98) in everything
    assert not {document(4).upper(), near} & everything
    assert not any("language model" in text or "spam" in text for text in everything)
    dropped = ledger["dropped"]
    assert dropped["duplicate of an earlier row"] == dropped["near-duplicate of an earlier row"] == 1
    assert sum(dropped.values()) == 4
    assert not actual["train"] & actual["test"]


def test_near_duplicates_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    pairs = [text for n in range(40) for text in (document(n), document(n) + " The end came.")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in pairs))
    folder, _ = built(
        tmp_path, {"sources": [{"type": "files", "paths": [str(tmp_path / "a.jsonl")]}], "test_size": 0.4}
    )
    firsts = {split: {row["text"].split("\n")[0] for row in rows_of(folder, split)} for split in ("train", "test")}
    assert len(firsts["train"]) + len(firsts["test"]) == 40
    assert not firsts["train"] & firsts["test"]


def test_one_book_is_divided_and_nothing_is_lost(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(document(n) for n in range(50)))
    sources = [{"type": "files", "paths": [str(tmp_path / "book.txt")]}]
    refused(built, tmp_path, {"sources": sources})
    folder, ledger = built(
        tmp_path, {"sources": sources, "steps": [{"type": "divide", "characters": 600}], "test_size": 0.3}
    )
    rows = rows_of(folder, "train") + rows_of(folder, "test")
    assert {row["text"] for row in rows} == {document(n) for n in range(50)}
    assert ledger["added"] == 49


def test_pieces_end_with_words_and_keep_every_word() -> None:
    text = document(7) * 5 + "x" * 400
    for most in (100, 333, 1000):
        pieces = divide_text(text, most)
        assert max(map(len, pieces)) <= most
        assert "".join("".join(pieces).split()) == "".join(text.split())
    assert divide_text("a" * 250, 100) == ["a" * 100, "a" * 100, "a" * 50]


def test_pieces_keep_their_indentation() -> None:
    lines = [f"    call(argument_{number})" for number in range(12)]
    pieces = divide_text("\n".join(lines) + "\n", 100)
    assert len(pieces) > 2 and "\n".join(pieces) == "\n".join(lines) + "\n"


def test_conversations_become_texts_without_a_template(tmp_path: Path) -> None:
    lines = [{"question": document(n), "answer": f"So it is.\n#### {n}"} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"type": "files", "paths": [str(tmp_path / "a.jsonl")], "format": "gsm8k"}
    folder, _ = built(tmp_path, {"sources": [source], "test_size": 0.3})
    texts = {row["text"] for split in ("train", "test") for row in rows_of(folder, split)}
    assert f"{document(3)}\n\nSo it is.\n#### 3" in texts


def test_builds_of_texts_are_shown_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for name, numbers in (("one", range(20)), ("two", range(1, 21))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("\n".join(json.dumps({"text": document(n)}) for n in numbers))
        source = {"type": "files", "name": "a", "paths": [str(tmp_path / name / "a.jsonl")]}
        rows.append(built(tmp_path / name, {"sources": [source], "test_size": 0.3})[0])
    comparison = compare(rows[0], rows[1])
    text = json.dumps(comparison)
    assert document(0).split("\n")[0] in text and not comparison["same rows"]
    assert main(["data", "show", str(rows[0])]) == 0
    assert "text: The " in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "text"},
        {"steps": [{"type": "pairs"}]},
        {"steps": [{"type": "score", "by": "ifd", "model": "m"}]},
        {"steps": [{"type": "divide", "character": 500}]},
        {"kind": "instructions", "steps": [{"type": "divide", "characters": 500}]},
        {"sources": [{"type": "files", "paths": ["a"], "format": "hh_rlhf"}]},
        {"kind": "prompts", "sources": [{"type": "files", "paths": ["a"], "format": "text"}]},
    ],
)  # fmt: skip
def test_wrong_recipes(refused: Refused, tmp_path: Path, content: dict[str, Any]) -> None:
    recipe = {"kind": "texts", "sources": [{"type": "files", "paths": ["a"]}], **content}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    refused(load_recipe, "r.yaml", tmp_path)


def test_steps_about_turns_say_that_texts_have_none(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": document(1)}))
    source = {"type": "files", "paths": [str(tmp_path / "a.jsonl")]}
    refused(built, tmp_path, {"sources": [source], "steps": [{"type": "near_duplicates", "of": "prompt"}]})


@pytest.mark.parametrize("kind", ["instructions", "prompts", "preferences", "unpaired"])
def test_rows_of_texts_make_nothing_with_turns(kind: str) -> None:
    row = {"id": "a", "source": "b", "text": document(1)}
    assert convert(row, SourceFormat("rows"), "here", kind) == [Dropped("a plain text, which has no turns")]
    assert convert(row, SourceFormat("rows"), "here", "texts") == [row]
