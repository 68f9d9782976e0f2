"""``docs/testing.md`` and ``docs/faults.md`` are true: every test they name exists, no stage or tuning is missing."""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path

from align.config.tuning import FullTuning, Tuning
from tests.config.test_misspelled_keys import METHODS

GUIDE = Path("docs/testing.md").read_text(encoding="utf-8")
COLUMNS = ["learns", "resumes exactly", "transformers", "vLLM"]
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")
UNION = typing.get_args(typing.get_args(Tuning)[0])
MADE = re.compile(r"\b([TV]) `\[([\w-]+)\]`")


def tables() -> list[list[list[str]]]:
    """Rows of cells of each table, the head first."""
    found = [[]]
    for line in GUIDE.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[rows[0], *rows[2:]] for rows in found if rows]


def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    named = NAMED.findall(GUIDE)
    assert len(named) > 60
    for file, name in named:
        assert name.startswith("test_"), name
        assert name in names_in(Path("tests") / file), f"{file} has no {name}"
    assert len(named) == GUIDE.count("::")  # none is written in a way that is not looked at here


def test_every_test_of_a_fault_exists() -> None:
    faults = Path("docs/faults.md").read_text(encoding="utf-8")
    rows = [line for line in faults.splitlines() if line.startswith("|")][2:]
    assert rows and all(len(row.strip("|").split("|")) == 3 and NAMED.search(row) for row in rows)
    named = NAMED.findall(faults)
    for file, name in named:
        assert name in names_in(Path("tests") / file), f"{file} has no {name}"
    assert len(named) == faults.count("::")


def test_every_row_fills_its_columns() -> None:
    stages, tunings = tables()
    assert stages[0][1:] == tunings[0][1:] == COLUMNS
    for row in [*stages[1:], *tunings[1:]]:
        assert len(row) == 1 + len(COLUMNS)
        for cell in row[1:]:
            assert NAMED.search(cell) or MADE.search(cell) or re.search(r"\b(TT|VT)\b|^the same$|^as `\w+`$", cell), row


def test_no_stage_and_no_tuning_is_missing() -> None:
    stages, tunings = tables()
    listed = {re.findall(r"`(\w+)`", row[0])[0] for row in stages[1:]}
    assert listed == set(METHODS)
    shown = {name for row in tunings[1:] for name in re.findall(r"`(\w+)`", row[0])}
    methods = [typing.get_args(kind.model_fields["method"].annotation)[0] for kind in UNION]
    assert shown >= {*methods, *FullTuning.model_fields} - {"method"}


def test_every_checkpoint_that_is_named_is_made() -> None:
    from tests.support.stages.made_checkpoints import POLICIES, REWARDS

    made = MADE.findall(GUIDE)
    assert len(made) > 50
    assert {name for _, name in made} <= {*POLICIES, *REWARDS}
    kinds = {name.partition("-")[0] for name in (*POLICIES, *REWARDS)}
    assert kinds == set(METHODS)
