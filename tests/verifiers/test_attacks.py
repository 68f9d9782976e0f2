"""The corpus of attacks: its form, the errors of align's verifiers on it, and the page that lists them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from align.config.verifiers import PROGRAMS
from benchmarks.verifier_attacks import (
    MARKS,
    REPLIES,
    comparison_table,
    judge_line,
    leaves_its_part,
    leaves_mt_bench_part,
    verdicts,
)
from examples.verifier_attacks import CORPUS, Case, Errors, count_errors, read_cases

CASES = read_cases()
PAGE = Path("docs/rewards.md").read_text(encoding="utf-8")
TABLES = PAGE.partition(MARKS[0])[2].partition(MARKS[1])[0]
QUICK_CODE = 40
"""Programs of the quick test: every fifth one, and none that needs its whole time."""
SLOW_CATEGORIES = ("time", "memory")


def of_kinds(*kinds: str) -> list[Case]:
    return [case for case in CASES if case["kind"] in kinds]


def check_errors(errors: Sequence[Errors], highest_share: float) -> None:
    assert errors
    for each in errors:
        assert len(each.false_accepts) <= highest_share * each.wrong, each.false_accepts
        assert each.row() in TABLES


def test_corpus_has_the_fields_that_its_header_describes() -> None:
    header = next(yaml.safe_load_all(CORPUS.read_text(encoding="utf-8")))
    assert len(CASES) >= 250
    assert f"has {len(CASES)} responses" in PAGE
    assert max(Counter(case["id"] for case in CASES).values()) == 1
    assert {case["kind"] for case in CASES} == set(header["kinds"]) >= set(PROGRAMS)
    assert {case["category"] for case in CASES} == set(header["categories"])
    for case in CASES:
        assert set(case) == set(header["fields"])
        assert case["expected"] in ("right", "wrong") and case["why"].endswith(".")
        assert (case["expected"] == "wrong") or case["category"] in ("form", "unicode_digits"), case["id"]
    for kind in header["kinds"]:
        assert {case["expected"] for case in of_kinds(kind)} == {"right", "wrong"}


@pytest.mark.parametrize("kind", sorted({*PROGRAMS, *REPLIES} - {"code"}))
def test_false_accepts_of_texts_are_at_most_one_percent(kind: str) -> None:
    cases = of_kinds(kind)
    check_errors(count_errors(cases, verdicts(cases)), 0.01)


def test_part_of_the_programs_has_no_false_accept() -> None:
    cases = [case for case in of_kinds("code") if case["category"] not in SLOW_CATEGORIES]
    cases = cases[:: len(cases) // QUICK_CODE]
    assert len(cases) >= QUICK_CODE
    accepted = verdicts(cases)
    assert not count_errors(cases, accepted)[0].false_accepts
    assert any(accepted.values())


@pytest.mark.slow
def test_all_programs_have_no_false_accept() -> None:
    cases = of_kinds("code")
    check_errors(count_errors(cases, verdicts(cases)), 0.0)


@pytest.mark.slow
def test_page_has_the_errors_of_published_rules() -> None:
    cases = of_kinds("number", "math", "choice", "exact", "code")
    assert "\n".join(comparison_table(cases, verdicts(cases))) in TABLES


def test_no_attack_leaves_its_part_of_a_judges_prompt() -> None:
    attacks = [case for case in of_kinds("judge") if case["expected"] == "wrong"]
    assert not any(leaves_its_part(case) for case in attacks)
    # The same attacks leave a part with fixed marks.
    escaped = [case["id"] for case in attacks if leaves_mt_bench_part(case)]
    assert "judge-fake_end-01" in escaped
    assert judge_line(CASES) in TABLES


def test_errors_of_a_verifier_are_counted() -> None:
    cases = of_kinds("number")
    (everything,) = count_errors(cases, {case["id"]: True for case in cases})
    assert len(everything.false_accepts) == everything.wrong and not everything.false_rejects
    (right,) = count_errors(cases, {case["id"]: case["expected"] == "right" for case in cases})
    assert right.row().count("| 0 | 0.0 |") == 2


def test_script_runs_a_verifier_of_another_project(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def verify(case):\n    if not case['response']:\n        raise ValueError\n"
        "    return case['reference'] in case['response']\n"
    )
    command = [sys.executable, str(CORPUS.with_suffix(".py")), "mine:verify", "--kind", "exact", "--list"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert lines[2].startswith("| `exact` | 22 | ") and "exact-wrong_value-01: More than the reference." in ended.stdout
    assert "exact-empty-01" not in ended.stdout  # an exception rejects
    wrong = subprocess.run([*command[:3], "--kind", "nothing"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and "there are no cases of the kind nothing" in wrong.stderr
