"""The shipped recipes on real files, linted for the embedded model: what is found there is so, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli.main import main
from align.config.recipe.source_settings import FilesSource
from align.config.validation import validate_plain
from align.data.formats import convert
from align.data.rows import Dropped
from align.data.sources import choose_format, read
from align.lint.across_rows import check_quoted_answers, check_repeated_answers, check_roles, differ_in_punctuation
from align.lint.findings import Findings, Place
from align.lint.turns import check_results, check_thoughts

SYSTEM = "unexpected-system-prompt"  # SmolLM2's template has one of its own
LABEL = "speaker-label-in-content"  # hh-rlhf's assistant says "Human:" itself; oasst quotes conversations
LONG = {"answer-truncated", "no-room-for-answer"}
NOTES = {"nearly-leaked-prompt", "prompt-with-several-answers"}
FOUND = {
    "dolly": ("ALIGN_DOLLY_FILES", "dolly-3k/dolly_3k.json", {SYSTEM, *LONG, *NOTES}),
    "hh_helpful": ("ALIGN_HH_FILES", "hh-rlhf/helpful-base.test.jsonl.gz", {SYSTEM, LABEL}),
    "hh_harmless": ("ALIGN_HH_HARMLESS_FILES", "hh-rlhf/harmless-base.test.jsonl.gz", {SYSTEM, LABEL}),
    "oasst": (
        "ALIGN_OASST_FILES",
        "oasst-en100/en_100_tree.jsonl",
        {SYSTEM, "over-max-length", "length-imbalance", LABEL},
    ),
    "oasst_sft": ("ALIGN_OASST_FILES", "oasst-en100/en_100_tree.jsonl", {SYSTEM, *LONG, LABEL}),
}


CROSS = {"labels-contradict"}
PUNCTUATION = {"sides-differ-in-punctuation"}
RAW = [
    ("arc/ARC-Easy.test.json", "instructions", set()),
    ("dolly-3k/dolly_3k.json", "instructions", set()),
    ("gsm8k/train.jsonl", "instructions", set()),
    ("hh-rlhf/harmless-base.test.jsonl.gz", "preferences", PUNCTUATION),
    ("hh-rlhf/helpful-base.test.jsonl.gz", "preferences", PUNCTUATION),
    ("hh-rlhf/helpful-base.test.jsonl.gz", "unpaired", set()),
    ("llamafactory-demo/alpaca_en_demo.json", "instructions", set()),
    ("llamafactory-demo/dpo_en_demo.json", "preferences", set()),
    ("llamafactory-demo/kto_en_demo.json", "unpaired", set()),
    ("llms-from-scratch/instruction-data-with-preference.json", "preferences", PUNCTUATION),
    ("oasst-en100/en_100_tree.jsonl", "instructions", set()),
    ("self-instruct/seed_tasks.jsonl", "instructions", set()),
    # An answer that is better than one answer and worse than another has both labels.
    ("stackexchange-paired-tiny/stack_exchange_paired_tiny.json", "unpaired", CROSS),
]


@pytest.mark.parametrize(("file", "kind", "expected"), RAW)
def test_checks_of_texts_have_no_false_alarm(file: str, kind: str, expected: set[str], shared_data: Path) -> None:
    source = validate_plain(FilesSource, {"type": "files", "paths": [str(shared_data / file)]})
    choice = choose_format(source, read(source, shared_data), kind)
    rows = [
        (Place("train", number), row)
        for number, (where, record) in enumerate(choice.records, 1)  # type: ignore[misc]
        for row in convert(record, choice.format, where, kind)
        if not isinstance(row, Dropped)
    ]
    findings = Findings(len(rows))
    for place, row in rows:
        check_thoughts(row, place, findings)
        check_results(row, place, findings)
        if row.get("chosen") and row.get("rejected"):
            chosen, rejected = (str(row[side][-1]["content"]) for side in ("chosen", "rejected"))
            if differ_in_punctuation(chosen, rejected):
                findings.add("sides-differ-in-punctuation", place, f"{chosen!r} and {rejected!r}")
    check_quoted_answers(rows, findings)
    check_roles(rows, findings)
    check_repeated_answers(rows, findings)
    assert findings.names() - NOTES - {"pairs-contradict"} == expected


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FOUND)
def test_real_data_has_no_fault_but_those_that_it_has(
    recipe: str,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variable, file, expected = FOUND[recipe]
    monkeypatch.setenv(variable, str(shared_data / file))
    path = Path(__file__).parents[2] / "data_recipes" / f"{recipe}.yaml"
    command = ["data", "lint", str(path), "--model", "smollm2-135m-instruct", "--max-length", "1024"]
    main([*command, "--store", str(tmp_path)])
    capsys.readouterr()
    assert main([*command, "--store", str(tmp_path), "--json"]) == 0
    text = capsys.readouterr().out
    assert {finding["name"] for finding in json.loads(text[text.index("[") :])} == expected
