"""``docs/testing.md`` and ``docs/faults.md`` are true: every test they name exists, no stage or tuning is missing."""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path

from align.config.tuning import FullTuning, Tuning
from tests.support.stages.kinds import METHODS

GUIDE = Path("docs/testing.md").read_text(encoding="utf-8")
CLAIMS = ["learns", "resumes exactly", "transformers", "vLLM"]
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")
UNION = typing.get_args(typing.get_args(Tuning)[0])
MADE = re.compile(r"\b([TV]) `\[([\w-]+)\]`")


def entries(heading: str) -> dict[str, dict[str, str]]:
    """Title of each entry below ``## heading`` → its claims: the bullet's first words → the tests it names."""
    section = GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    listed: dict[str, dict[str, str]] = {}
    for entry in section.split("\n### ")[1:]:
        title, _, body = entry.partition("\n")
        bullets = re.split(r"^- ", body, flags=re.MULTILINE)[1:]
        claims = [" ".join(bullet.split()).partition(": ") for bullet in bullets]
        assert title not in listed, title
        assert len({claim for claim, _, _ in claims}) == len(claims), title
        listed[title] = {claim: tests for claim, _, tests in claims}
    return listed


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
    """Each entry of the page says a fault, what happens, and the tests that do it."""
    faults = Path("docs/faults.md").read_text(encoding="utf-8")
    paragraphs = [text.split("\n\n")[0] for text in faults.split("\n**")[1:]]
    assert len(paragraphs) > 100
    for paragraph in paragraphs:
        fault, _, rest = " ".join(paragraph.split()).partition(".** ")
        effect, _, tests = rest.partition(" Tests: " if " Tests: " in rest else " Test: ")
        assert fault and effect.strip() and NAMED.search(tests), paragraph
    named = NAMED.findall(faults)
    for file, name in named:
        assert name in names_in(Path("tests") / file), f"{file} has no {name}"
    assert len(named) == faults.count("::")


def test_every_entry_names_the_tests_of_every_claim() -> None:
    for title, claims in {**entries("Stages"), **entries("Tunings")}.items():
        assert list(claims) == CLAIMS, title
        for tests in claims.values():
            assert (
                NAMED.search(tests)
                or MADE.search(tests)
                or re.search(r"\b(TT|VT)\b|^the same tests?$|^as `\w+`$", tests)
            ), (title, tests)


def test_no_stage_and_no_tuning_is_missing() -> None:
    listed = {re.findall(r"`(\w+)`", title)[0] for title in entries("Stages")}
    assert listed == set(METHODS)
    shown = {name for title in entries("Tunings") for name in re.findall(r"`(\w+)`", title)}
    methods = [typing.get_args(kind.model_fields["method"].annotation)[0] for kind in UNION]
    assert shown >= {*methods, *FullTuning.model_fields} - {"method"}


def test_every_checkpoint_that_is_named_is_made() -> None:
    from tests.support.stages.trained_checkpoints import POLICIES, REWARDS

    matches = MADE.findall(GUIDE)
    assert len(matches) > 50
    assert {name for _, name in matches} <= {*POLICIES, *REWARDS}
    kinds = {name.partition("-")[0] for name in (*POLICIES, *REWARDS)}
    assert kinds == set(METHODS)
