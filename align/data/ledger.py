"""The ledger: what every step did to the rows of every source, in numbers that must add up."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 3
"""Dropped rows shown for each step and reason; all of them are in the build's ``dropped`` files."""


@dataclass
class Tally:
    """One step, one source: ``rows_in + added = rows_out + sum(dropped)``; ``changed`` ones are among the last."""

    rows_in: int = 0
    rows_out: int = 0
    added: int = 0
    changed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.rows_in + other.rows_in,
            self.rows_out + other.rows_out,
            self.added + other.added,
            self.changed + other.changed,
            self.dropped + other.dropped,
        )

    def to_json(self) -> dict[str, Any]:
        """As it stands in the ledger. Raises ``AssertionError`` when it does not add up."""
        if self.rows_in + self.added != self.rows_out + sum(self.dropped.values()):
            raise AssertionError(f"the ledger does not add up: {self}")
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "added": self.added,
            "changed": self.changed,
            "dropped": dict(sorted(self.dropped.items())),
        }


class Counts:
    """What happened to some rows, by step and source (numbers of both), with the first examples of each reason."""

    def __init__(self) -> None:
        self.tallies: defaultdict[tuple[int, int], Tally] = defaultdict(Tally)
        self.examples: defaultdict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
        self.unused: defaultdict[int, Counter[str]] = defaultdict(Counter)
        """Of each source, the fields that were not used and in how many records they stood."""

    def drop(self, step: int, source: int, reason: str, example: dict[str, Any]) -> None:
        """One row went in and does not come out."""
        self.tallies[step, source].dropped[reason] += 1
        shown = self.examples[step, reason]
        if len(shown) < EXAMPLES:
            shown.append(example)

    def merge(self, other: Counts) -> None:
        """Add what happened to later rows."""
        for key, tally in other.tallies.items():
            self.tallies[key] += tally
        for reason, examples in other.examples.items():
            shown = self.examples[reason]
            shown += examples[: EXAMPLES - len(shown)]
        for source, fields in other.unused.items():
            self.unused[source] += fields

    def to_json(self) -> dict[str, Any]:
        """Lists, since JSON has no pairs as keys."""
        return {
            "tallies": [[*key, tally.to_json()] for key, tally in self.tallies.items()],
            "examples": [[*key, examples] for key, examples in self.examples.items()],
            "unused": [[source, dict(fields)] for source, fields in self.unused.items()],
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Counts:
        """What ``to_json`` gave."""
        counts = cls()
        for step, source, tally in found["tallies"]:
            counts.tallies[step, source] = Tally(**{**tally, "dropped": Counter(tally["dropped"])})
        for step, reason, examples in found["examples"]:
            counts.examples[step, reason] = examples
        for source, fields in found["unused"]:
            counts.unused[source] = Counter(fields)
        return counts


@dataclass(frozen=True)
class SourceLine:
    """What the ledger says of a source beside its counts."""

    name: str
    type: str
    part: str
    license: str | None
    identity: dict[str, str]


def make_ledger(
    counts: Counts,
    steps: Sequence[str],
    sources: Sequence[SourceLine],
    notes: dict[int, dict[str, Any]],
    splits: dict[str, int],
    digests: dict[str, str],
    format_choices: dict[str, str],
) -> dict[str, Any]:
    """The whole ledger. Raises ``AssertionError`` when steps do not hand on what they say."""
    lines = [_step_line(counts, number, name, sources, notes.get(number, {})) for number, name in enumerate(steps)]
    for before, after in itertools.pairwise(lines):
        if before["rows_out"] != after["rows_in"]:
            raise AssertionError(f"{before['step']} hands on {before['rows_out']} rows, {after['step']} got others")
    if lines[-1]["rows_out"] != sum(splits.values()):
        raise AssertionError(f"the splits {splits} are not the {lines[-1]['rows_out']} rows that went out")
    whole = sum((tally for tally in counts.tallies.values()), Tally())
    return {
        "rows_in": lines[0]["rows_in"],
        "rows_out": lines[-1]["rows_out"],
        "added": whole.added,
        "dropped": dict(sorted(whole.dropped.items())),
        "splits": splits,
        "format_choices": format_choices,
        "sources": [_source_line(counts, number, source, len(steps)) for number, source in enumerate(sources)],
        "steps": lines,
        "digests": digests,
    }


def _step_line(
    counts: Counts, number: int, name: str, sources: Sequence[SourceLine], notes: dict[str, Any]
) -> dict[str, Any]:
    tallies = {source.name: counts.tallies.get((number, at), Tally()) for at, source in enumerate(sources)}
    whole = sum(tallies.values(), Tally())
    examples = {reason: counts.examples[number, reason] for reason in sorted(whole.dropped)}
    return {
        "step": f"{number} {name}",
        **whole.to_json(),
        "by_source": {name: tally.to_json() for name, tally in tallies.items()},
        "examples": examples,
        "notes": notes,
    }


def _source_line(counts: Counts, number: int, source: SourceLine, steps: int) -> dict[str, Any]:
    tallies = [counts.tallies.get((step, number), Tally()) for step in range(steps)]
    whole = sum(tallies, Tally())
    whole.rows_in, whole.rows_out = tallies[0].rows_in, tallies[-1].rows_out
    return {
        "source": source.name,
        "type": source.type,
        "part": source.part,
        "license": source.license,
        "identity": source.identity,
        "unused_fields": dict(sorted(counts.unused[number].items())),
        **whole.to_json(),
    }


def summary_lines(ledger: dict[str, Any]) -> Iterator[str]:
    """The ledger in words, a line per source and reason."""
    for line in ledger["sources"]:
        added = f", {line['added']} made of them" if line["added"] else ""
        yield f"{line['source']}: {line['rows_in']} rows read{added}, {line['rows_out']} kept"
        for reason, count in line["dropped"].items():
            yield f"  {count} dropped: {reason}"
        if line["unused_fields"]:
            fields = ", ".join(f"{name} ({count})" for name, count in line["unused_fields"].items())
            yield f"  fields that were not used, and in how many rows' records: {fields}"
    for name, choice in ledger["format_choices"].items():
        yield f"{name}: {choice}"
    yield f"train {ledger['splits']['train']}, test {ledger['splits']['test']}"


def empty_split(name: str, ledger: dict[str, Any]) -> str:
    """Why a split has no rows, and what to do; then what each step dropped, with the place of an example."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in ledger["dropped"].items()) or "none dropped"
    lines = [
        f"no {name} row is left: {ledger['rows_in']} rows read, {ledger['rows_out']} left ({reasons}). Loosen the "
        "recipe's filters, change test_size, or add rows."
    ]
    for step in ledger["steps"]:
        for reason, count in step["dropped"].items():
            example = next((f", such as {shown['where']}" for shown in step["examples"][reason]), "")
            lines.append(f"  step {step['step']}: {count} of {step['rows_in']} dropped, {reason}{example}")
    return "\n".join(lines)
