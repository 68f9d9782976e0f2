"""Settings of the linter in a training stage, and the rules that it checks. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from align.config.base import Config
from align.config.validation import suggest

MAX_ROWS = 10_000

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Rule:
    """A kind of fault. A stage counts the ``counted`` kinds over all rows itself, and warns of them anyway."""

    severity: Severity
    what: str
    remedy: str
    counted: bool = False


def _load_rules() -> dict[str, Rule]:
    groups = json.loads(Path(__file__).with_name("lint_rules.json").read_text(encoding="utf-8"))
    return {name: Rule(**fields) for rules in groups.values() for name, fields in rules.items()}


RULES = _load_rules()
"""Every rule by name, in the order of a report."""


class LintSettings(Config):
    """Checks of the rows' tokens before the first step (docs/lint.md). They change no result, so they are in no key."""

    waive: list[str] = Field(default_factory=list)
    """Names of intended findings: their errors do not stop the stage, their warnings are recorded but not shown."""
    rows: int | None = Field(MAX_ROWS, ge=1)
    """Most rows per split to look at, drawn by the seed; null looks at all of them."""

    @field_validator("waive")
    @classmethod
    def _check_waived_names(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in RULES:
                raise ValueError(f"there is no finding '{name}'.{suggest(name, RULES)}")
        return names
