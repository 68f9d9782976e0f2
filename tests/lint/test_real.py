"""The shipped recipes on real files, linted for the embedded model: what is found there is so, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli.main import main

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
