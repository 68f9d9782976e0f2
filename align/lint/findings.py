"""Findings of the linter: faults counted by row, with a few examples each. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from align.config.stages.lint import RULES, SEVERITIES, Severity

MAX_EXAMPLES = 5
MAX_CHARACTERS = 160


@dataclass(frozen=True)
class Place:
    """A row: its split, its number in it (from 1), and its id and source location if they are known."""

    split: str
    row: int
    id: str = ""
    where: str = ""

    def __str__(self) -> str:
        details = ", ".join(part for part in (self.id, self.where) if part)
        return f"{self.split} row {self.row}" + (f" ({details})" if details else "")


@dataclass(frozen=True)
class Example:
    """One row with the fault. ``place`` is None for a fault of the template or of a complete split."""

    place: Place | None
    excerpt: str


@dataclass(frozen=True)
class Finding:
    """One kind of fault, with the number of rows that have it (0 for a fault of no particular row)."""

    name: str
    severity: Severity
    count: int
    of: int
    """Rows looked at."""
    what: str
    remedy: str
    examples: tuple[Example, ...] = ()
    waived: bool = False

    @property
    def counted(self) -> bool:
        """True if a stage counts this fault over all rows anyway."""
        return RULES[self.name].counted

    def headline(self) -> str:
        """Return the finding in one line."""
        rows = f", {self.count} of {self.of} rows" if self.count else ""
        return f"{self.severity}{' (waived)' if self.waived else ''} {self.name}{rows}: {self.what}."

    def lines(self) -> list[str]:
        """Return headline, examples and remedy as shown to the user; texts of rows are escaped."""
        lines = [self.headline()]
        for example in self.examples:
            place = escape_control(f"{example.place}: ") if example.place else ""
            lines.append(f"    {place}{escape_control(example.excerpt)}")
        return [*lines, f"    -> {self.remedy}"]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def format_findings(findings: Sequence[Finding]) -> str:
    """Return all findings with their examples and remedies, and a last line with their numbers."""
    lines = [line for finding in findings for line in finding.lines()]
    counts = []
    for severity in SEVERITIES:
        count = sum(finding.severity == severity for finding in findings)
        counts.append(f"{count} {severity}{'' if count == 1 else 's'}")
    return "\n".join([*lines, ", ".join(counts)])


def has_errors(findings: Sequence[Finding]) -> bool:
    """Return True if a finding is an error."""
    return any(finding.severity == "error" for finding in findings)


def escape_control(text: str) -> str:
    """Return ``text`` on one line, with every character that could steer a terminal escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


@dataclass
class Findings:
    """Collects faults. A row counts once per rule, however often it has the fault."""

    looked_at: int = 0
    """Rows looked at so far."""
    _rows: dict[str, set[Place]] = field(default_factory=dict)
    _examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(self, name: str, place: Place | None, excerpt: str, is_uniform: bool = False) -> None:
        """Record the fault ``name`` of the row at ``place`` (None: no particular one); ``excerpt`` shows it.

        A fault that ``is_uniform``, the same in all rows, has one example only.
        """
        assert name in RULES, name
        rows = self._rows.setdefault(name, set())
        examples = self._examples.setdefault(name, [])
        if place in rows:
            # One row with many faults of a kind must not use up the examples.
            return
        if place is not None:
            rows.add(place)
        if len(examples) < (1 if is_uniform else MAX_EXAMPLES):
            examples.append(Example(place, _short(excerpt)))

    def names(self) -> set[str]:
        """Return the names of the faults so far."""
        return set(self._rows)

    def result(self, waive: Iterable[str] = ()) -> list[Finding]:
        """Return the findings, the most severe first, then in the order of ``RULES``."""
        waived = set(waive)
        findings = []
        for name, rule in RULES.items():
            if name not in self._rows:
                continue
            finding = Finding(
                name=name,
                severity=rule.severity,
                count=len(self._rows[name]),
                of=self.looked_at,
                what=rule.what,
                remedy=rule.remedy,
                examples=tuple(self._examples[name]),
                waived=name in waived,
            )
            findings.append(finding)
        return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
