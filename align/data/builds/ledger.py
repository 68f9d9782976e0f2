"""The ledger: counts of what every step did to the rows of every source, which must add up."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.config.recipe.record_mapping import ROW_FIELDS
from align.data.formats import FieldUsage

MOST_NAMES = 5
"""Fields that the summary's advice names."""
MANY_PROMPTS = 20
LARGE_CLUSTER = 0.1
"""Number and share of prompts from which on a cluster of near-duplicates is warned of."""
EXAMPLES = 3
"""Dropped rows shown for each step and reason; all of them are in the build's ``dropped`` files."""


@dataclass
class Tally:
    """Counts of one step and source: ``rows_in + added = rows_out + sum(dropped)``; ``rows_out`` has ``changed``."""

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
        """Return the ledger's form. Raises ``AssertionError`` when the counts do not add up."""
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
    """Counts of some rows by step and source (both as numbers), with the first examples of each reason."""

    def __init__(self) -> None:
        self.tallies: defaultdict[tuple[int, int], Tally] = defaultdict(Tally)
        self.examples: defaultdict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
        self.usage: defaultdict[int, FieldUsage] = defaultdict(FieldUsage)
        """For each source, the number of records with each unused and each kept field."""

    def drop(self, step: int, source: int, reason: str, example: dict[str, Any]) -> None:
        """Count a row that a step drops."""
        self.tallies[step, source].dropped[reason] += 1
        examples = self.examples[step, reason]
        if len(examples) < EXAMPLES:
            examples.append(example)

    def merge(self, other: Counts) -> None:
        """Add the counts of later rows."""
        for step_and_source, tally in other.tallies.items():
            self.tallies[step_and_source] += tally
        for key, new_examples in other.examples.items():
            examples = self.examples[key]
            # Shards are merged in order, so the first examples are the same however many workers there are.
            examples += new_examples[: EXAMPLES - len(examples)]
        for source, usage in other.usage.items():
            self.usage[source].unused += usage.unused
            self.usage[source].kept += usage.kept

    def to_json(self) -> dict[str, Any]:
        """Return lists, since JSON has no pairs as keys."""
        return {
            "tallies": [[*key, tally.to_json()] for key, tally in self.tallies.items()],
            "examples": [[*key, examples] for key, examples in self.examples.items()],
            "usage": [[source, dict(usage.unused), dict(usage.kept)] for source, usage in self.usage.items()],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Counts:
        """Return the counts that ``to_json`` wrote."""
        counts = cls()
        for step, source, tally in values["tallies"]:
            counts.tallies[step, source] = Tally(**{**tally, "dropped": Counter(tally["dropped"])})
        for step, reason, examples in values["examples"]:
            counts.examples[step, reason] = examples
        for source, *counters in values["usage"]:
            counts.usage[source] = FieldUsage(*map(Counter, counters))
        return counts


def make_ledger(
    counts: Counts,
    steps: Sequence[str],
    sources: Sequence[dict[str, Any]],
    *,
    notes: dict[int, dict[str, Any]],
    splits: dict[str, int],
    digests: dict[str, str],
    format_choices: dict[str, str],
) -> dict[str, Any]:
    """Return the ledger. ``sources`` are the facts about each source, in addition to its counts.

    Raises ``AssertionError`` when a step's input is not the output of the step before.
    """
    lines = [_step_line(counts, number, name, sources, notes.get(number, {})) for number, name in enumerate(steps)]
    # Every row must be accounted for: a step receives what the step before returned.
    for before, after in itertools.pairwise(lines):
        if before["rows_out"] != after["rows_in"]:
            raise AssertionError(
                f"{before['step']} returned {before['rows_out']} rows, {after['step']} received {after['rows_in']}"
            )
    if lines[-1]["rows_out"] != sum(splits.values()):
        raise AssertionError(f"the splits {splits} are not the {lines[-1]['rows_out']} rows that went out")
    total = sum(counts.tallies.values(), Tally())
    return {
        "rows_in": lines[0]["rows_in"],
        "rows_out": lines[-1]["rows_out"],
        "added": total.added,
        "dropped": dict(sorted(total.dropped.items())),
        "splits": splits,
        "format_choices": format_choices,
        "sources": [_source_line(counts, number, source, len(steps)) for number, source in enumerate(sources)],
        "steps": lines,
        "digests": digests,
    }


def _step_line(
    counts: Counts, number: int, name: str, sources: Sequence[dict[str, Any]], notes: dict[str, Any]
) -> dict[str, Any]:
    tallies = {source["source"]: counts.tallies.get((number, index), Tally()) for index, source in enumerate(sources)}
    total = sum(tallies.values(), Tally())
    examples = {reason: counts.examples[number, reason] for reason in sorted(total.dropped)}
    return {
        "step": f"{number} {name}",
        **total.to_json(),
        "by_source": {name: tally.to_json() for name, tally in tallies.items()},
        "examples": examples,
        "notes": notes,
    }


def _source_line(counts: Counts, number: int, source: dict[str, Any], steps: int) -> dict[str, Any]:
    tallies = [counts.tallies.get((step, number), Tally()) for step in range(steps)]
    total = sum(tallies, Tally())
    # Summed over steps, rows in and out would count a row once for each step.
    total.rows_in = tallies[0].rows_in
    total.rows_out = tallies[-1].rows_out
    usage = counts.usage[number]
    return {
        **source,
        "unused_fields": dict(sorted(usage.unused.items())),
        **({"kept_fields": dict(sorted(usage.kept.items()))} if usage.kept else {}),
        **total.to_json(),
    }


def summary_lines(ledger: dict[str, Any]) -> Iterator[str]:
    """Yield the ledger in words, a line per source and reason."""
    for line in ledger["sources"]:
        added = f", {line['added']} added" if line["added"] else ""
        yield f"{line['source']}: {line['rows_in']} rows read{added}, {line['rows_out']} kept"
        for reason, count in line["dropped"].items():
            yield f"  {count} dropped: {reason}"
        if line["unused_fields"]:
            yield f"  {_describe_unused(line)}"
        if line.get("kept_fields"):
            fields = ", ".join(f"{name} ({count})" for name, count in line["kept_fields"].items())
            yield f"  columns that stay with the rows, and in how many: {fields}"
    for name, choice in ledger["format_choices"].items():
        yield f"{name}: {choice}"
    yield f"train {ledger['splits']['train']}, test {ledger['splits']['test']}"


def unused_lines(ledger: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each source with fields that no format, step or setting read."""
    for line in ledger["sources"]:
        if line["unused_fields"]:
            yield f"{line['source']}: {_describe_unused(line)}"


def _describe_unused(line: dict[str, Any]) -> str:
    fields = ", ".join(f"{name} ({count})" for name, count in line["unused_fields"].items())
    return f"fields that were not used, and in how many rows' records: {fields}{_keep_hint(line)}"


def describe_large_cluster(ledger: dict[str, Any]) -> str | None:
    """Return a warning where many prompts are near-duplicates of one another, and so on one side of the split."""
    split = ledger["steps"][-1]["notes"]
    prompts = split.get("prompts", 0)
    largest = split.get("largest_cluster", 0)
    if largest < max(MANY_PROMPTS, LARGE_CLUSTER * prompts):
        return None
    test = ledger["splits"]["test"]
    rows = sum(ledger["splits"].values())
    return (
        f"{largest} of {prompts} prompts are near-duplicates of one another and stay on one side of the split; the "
        f"test split has {test / rows:.0%} of the rows. Where prompts follow a template, set `near_duplicate_prompts: "
        "null` in the recipe."
    )


def _keep_hint(line: dict[str, Any]) -> str:
    """Return the setting that keeps unused fields with their rows; empty if no record has a field to keep."""
    fields = dict.fromkeys(name.partition(".")[0] for name in line["unused_fields"])
    identifiers = [name for name in fields if name.isidentifier()]
    names = [name for name in identifiers if name not in ROW_FIELDS]
    if not names:
        return ""
    shown = ", ".join([*names[:MOST_NAMES], *(["..."] if len(names) > MOST_NAMES else [])])
    return f' (keep: [{shown}] keeps them as row["{names[0]}"] and so on)'


def describe_empty_split(name: str, ledger: dict[str, Any]) -> str:
    """Return the reason why a split has no rows, the remedy, and what each step dropped, with an example's place."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in ledger["dropped"].items()) or "none dropped"
    lines = [
        f"no {name} row is left: {ledger['rows_in']} rows read, {ledger['rows_out']} left ({reasons}). Loosen the "
        "recipe's filters, change test_size, or add rows."
    ]
    for step in ledger["steps"]:
        for reason, count in step["dropped"].items():
            examples = step["examples"][reason]
            example = f", such as {examples[0]['where']}" if examples else ""
            lines.append(f"  step {step['step']}: {count} of {step['rows_in']} dropped, {reason}{example}")
    return "\n".join(lines)
