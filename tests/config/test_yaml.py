"""Reading YAML: places of mistakes, merges, aliases, files that cannot be read."""

from pathlib import Path

import pytest

from align.config.yaml import load_yaml, parse_yaml
from align.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1,\n", "line 3, column 1"),
        ("a: 1\n  b: 2\n", "line 2, column 4"),
        ("a: 1\na: 2\n", "line 2, column 1: duplicate key 'a'"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("a: \t- x", "line 1"),
    ],
)
def test_invalid_yaml_names_line_and_column(text: str, expected: str) -> None:
    with pytest.raises(UserError, match="p.yaml: invalid YAML") as caught:
        parse_yaml(text, "p.yaml")
    assert expected in str(caught.value)


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


def test_a_key_written_twice_beside_a_merge_is_refused() -> None:
    with pytest.raises(UserError, match=r"line 2, column 23: duplicate key 'n'"):
        parse_yaml("one: &one {n: 1}\ntwo: {<<: *one, n: 2, n: 3}\n", "x")


def test_aliases_that_unfold_without_end_are_refused() -> None:
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdef", "bcdefg", strict=True)]
    with pytest.raises(UserError, match="unfold to more than 1,000,000 values"):
        parse_yaml("\n".join(lines), "x")
    with pytest.raises(UserError, match="is inside what it names"):
        parse_yaml("a: &a {b: *a}", "x")


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "5E-4", ".5e-3"])
def test_a_learning_rate_is_a_number_in_every_spelling(text: str) -> None:
    assert parse_yaml(text, "x") == 5e-4


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=r"no such file.*Did you mean .*quickstart\.yaml"):
        load_yaml(tmp_path / "quickstrat.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_yaml(tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        load_yaml(tmp_path / "empty.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_yaml(tmp_path)
