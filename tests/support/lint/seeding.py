"""Seeded faults: functions that spoil something in a chat dialect, lint it, and return the findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from align.lint.findings import Finding
from align.lint.linter import Options
from tests.support.lint import dialects
from tests.support.lint.dialects import SPECS, Spec
from tests.support.lint.harness import SPOILT, encoded, instructions, look

ROW = f"row-{SPOILT}"
"""Id of the row that is spoilt."""


@dataclass
class Case:
    """A dialect to spoil something in."""

    name: str
    also: set[str] = field(default_factory=set)
    """Findings that follow from the fault and may be reported with it."""
    everywhere: bool = False
    """True where the fault is in every row, or in no particular one."""

    @property
    def spec(self) -> Spec:
        return SPECS[self.name]

    @property
    def tokenizer(self) -> Any:
        return dialects.tokenizer_of(self.name)


Seed = Callable[[Case], dict[str, Finding]]
SEEDS: list[tuple[str, Seed]] = []


def seeds(fault: str) -> Callable[[Seed], Seed]:
    """Registers a function that seeds ``fault``, looks, and returns the findings."""

    def register(function: Seed) -> Seed:
        SEEDS.append((fault, function))
        return function

    return register


def spoilt(case: Case, change: Callable[[dict[str, list[int]]], object], **options: Any) -> dict[str, Finding]:
    """A look at clean rows after ``change`` was made to the tokens of one of them."""
    rows = instructions()
    prepared = encoded(case.tokenizer, rows)
    change(prepared[SPOILT])
    return look(case.tokenizer, rows, prepared, options=Options(**options))
