"""What a look at the rows has found: counted by row, with a few examples each. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from align.config.stages.lint_rules import RULES, SEVERITIES, Severity

MOST_EXAMPLES = 5
MOST_CHARACTERS = 160


@dataclass(frozen=True)
class Place:
    """A row: its split, its number in it (from 1), its id, and where it was read, as far as that is known."""

    split: str
    row: int
    id: str = ""
    where: str = ""

    def __str__(self) -> str:
        known = ", ".join(part for part in (self.id, self.where) if part)
        return f"{self.split} row {self.row}" + (f" ({known})" if known else "")


@dataclass(frozen=True)
class Example:
    """One row with the fault. ``place`` is None for a fault of the template or of a whole split."""

    place: Place | None
    excerpt: str


@dataclass(frozen=True)
class Finding:
    """One kind of fault: how many rows have it (0 for one of no particular row) out of how many looked at."""

    name: str
    severity: Severity
    count: int
    of: int
    what: str
    remedy: str
    examples: tuple[Example, ...] = ()
    waived: bool = False

    @property
    def counted(self) -> bool:
        """Whether a stage counts this over all rows anyway."""
        return RULES[self.name].counted

    def headline(self) -> str:
        """One line."""
        rows = f", {self.count} of {self.of} rows" if self.count else ""
        return f"{self.severity}{' (waived)' if self.waived else ''} {self.name}{rows}: {self.what}."

    def lines(self) -> list[str]:
        """As shown to the user; texts of rows are made harmless by ``shown``."""
        lines = [self.headline()]
        lines += [
            f"    {shown(f'{example.place}: ') if example.place else ''}{shown(example.excerpt)}"
            for example in self.examples
        ]
        return [*lines, f"    -> {self.remedy}"]

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def shown(text: str) -> str:
    """``text`` on one line, with every character that could steer a terminal escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


@dataclass
class Findings:
    """Collects faults as they are met. A row counts once per name, however often it has the fault."""

    looked_at: int = 0
    _rows: dict[str, set[Place]] = field(default_factory=dict)
    _examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(self, name: str, place: Place | None, excerpt: str, alike: bool = False) -> None:
        """Note that the row at ``place`` (None: no particular one) has the fault ``name``; ``excerpt`` shows it.

        One example is enough where all rows' are ``alike``.
        """
        assert name in RULES, name
        rows, examples = self._rows.setdefault(name, set()), self._examples.setdefault(name, [])
        if place in rows:
            return
        if place is not None:
            rows.add(place)
        if len(examples) < (1 if alike else MOST_EXAMPLES):
            examples.append(Example(place, _short(excerpt)))

    def names(self) -> set[str]:
        """Names of the faults met so far."""
        return set(self._rows)

    def result(self, waive: Iterable[str] = ()) -> list[Finding]:
        """The worst first, then in the order of ``RULES``."""
        waived = set(waive)
        found = [
            Finding(
                name, rule.severity, len(self._rows[name]), self.looked_at, rule.what, rule.remedy,
                tuple(self._examples[name]), name in waived,
            )
            for name, rule in RULES.items()
            if name in self._rows
        ]  # fmt: skip
        return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
