"""Reading YAML: places of mistakes, merges, aliases, files that cannot be read."""

from pathlib import Path

import pytest

from align.config.yaml import load_yaml, parse_yaml
from tests.support.refusals import Refused


def test_merged_keys_are_the_mappings_own_to_change() -> None:
    text = """
one: &one {stage: sft, tuning: {rank: 1}, rate: 1}
two: &two {<<: *one, rate: 2}
three: {<<: *two, n: 3}
"""
    parsed = parse_yaml(text, "x")
    assert parsed["two"] == {"stage": "sft", "tuning": {"rank": 1}, "rate": 2}
    assert parsed["three"] == {"stage": "sft", "tuning": {"rank": 1}, "rate": 2, "n": 3}
    parsed["one"]["tuning"]["rank"] = 9
    assert parsed["three"]["tuning"] == {"rank": 1}  # nothing is shared


def test_aliases_that_unfold_without_end_are_refused(refused: Refused) -> None:
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdef", "bcdefg", strict=True)]
    refused(lambda: parse_yaml("\n".join(lines), "x"))
    refused(parse_yaml, "a: &a {b: *a}", "x")


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "5E-4", ".5e-3"])
def test_a_learning_rate_is_a_number_in_every_spelling(text: str) -> None:
    assert parse_yaml(text, "x") == 5e-4


def test_files_that_cannot_be_read(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    refused(load_yaml, tmp_path / "quickstrat.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    refused(load_yaml, tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("")
    refused(load_yaml, tmp_path / "empty.yaml")
    refused(load_yaml, tmp_path)
