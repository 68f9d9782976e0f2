"""From a recipe to train and test rows and the ledger that accounts for every record read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data import embedded, splits
from align.data.formats import convert
from align.data.recipe import Filters, Recipe
from align.data.rows import Dropped, Row
from align.data.source_configs import EmbeddedSource, Part, Source
from align.data.sources import BadRecord, choose_format, read
from align.errors import UserError

Progress = Callable[[int], None]


@dataclass
class Account:
    """One source's line in the ledger: ``rows_in = rows_out + sum(dropped)``."""

    name: str
    type: str
    part: Part
    rows: list[Row] = field(default_factory=list)
    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def keep(self, wanted: Callable[[Row], bool], reason: str) -> None:
        """Drop the rows that are not wanted, counted under ``reason``."""
        kept = [row for row in self.rows if wanted(row)]
        self.dropped[reason] += len(self.rows) - len(kept)
        self.rows = kept

    def as_dict(self) -> dict[str, Any]:
        """The ledger's line."""
        dropped = {reason: count for reason, count in sorted(self.dropped.items()) if count}
        return {
            "source": self.name,
            "type": self.type,
            "part": self.part,
            "rows_in": self.rows_in,
            "rows_out": len(self.rows),
            "dropped": dropped,
        }


@dataclass(frozen=True)
class Dataset:
    """The finished rows and the ledger (JSON-able)."""

    train: list[Row]
    test: list[Row]
    ledger: dict[str, Any]


def assemble(recipe: Recipe, base: Path, progress: Progress | None = None) -> Dataset:
    """Read, convert, filter, deduplicate and split; ``base`` is where relative paths start.

    Raises ``UserError`` for what cannot be read, and for a split that ends up empty, with the counts per reason.
    """
    accounts = [_read(recipe, source, base, progress) for source in recipe.sources]
    seen: set[str] = set()
    for account in accounts:
        account.keep(lambda row: _fits(row, recipe.filters), "filtered by length or turns")
        account.keep(lambda row: _first(row["id"], seen), "duplicate")
    _limit(recipe, accounts)
    train, test = _split(recipe, accounts)
    ledger = _ledger(accounts, train, test)
    for name, rows in (("train", train), ("test", test)):
        if not rows:
            raise UserError(_empty(name, ledger))
    return Dataset(train, test, ledger)


def _read(recipe: Recipe, source: Source, base: Path, progress: Progress | None) -> Account:
    if isinstance(source, EmbeddedSource):
        account = Account("embedded", source.type, source.part)
        account.rows = [
            _for_kind(row, recipe.kind) for row in embedded.generate(source.size, recipe.seed, source.families)
        ]
        account.rows_in = len(account.rows)
        return account
    form, _, records = choose_format(source, read(source, base), recipe.kind)
    account = Account(source.label, source.type, source.part)
    for item in records:
        if isinstance(item, BadRecord):
            raise item
        where, record = item
        for found in convert(record, form, where, recipe.kind, source.options):
            account.rows_in += 1
            if progress and account.rows_in % 1000 == 0:
                progress(account.rows_in)
            if isinstance(found, Dropped):
                account.dropped[found.reason] += 1
            else:
                account.rows.append({"source": source.label, **found})
    return account


def _for_kind(row: Row, kind: str) -> Row:
    return {name: value for name, value in row.items() if kind == "instructions" or name != "completion"}


def _first(name: str, seen: set[str]) -> bool:
    new = name not in seen
    seen.add(name)
    return new


def _fits(row: Row, filters: Filters) -> bool:
    prompt = sum(len(message["content"]) for message in row["prompt"])
    reply = max((len(row[n][0]["content"]) for n in ("completion", "chosen", "rejected") if n in row), default=0)
    return not (
        (filters.max_chars is not None and prompt + reply > filters.max_chars)
        or (filters.max_prompt_chars is not None and prompt > filters.max_prompt_chars)
        or (filters.max_turns is not None and len(row["prompt"]) > filters.max_turns)
    )


def _limit(recipe: Recipe, accounts: list[Account]) -> None:
    rows = [row for account in accounts for row in account.rows]
    if recipe.max_rows is not None and len(rows) > recipe.max_rows:
        kept = {row["id"] for row in splits.sample(rows, recipe.max_rows, recipe.seed)}
        for account in accounts:
            account.keep(lambda row: row["id"] in kept, "over max_rows")


def _split(recipe: Recipe, accounts: list[Account]) -> tuple[list[Row], list[Row]]:
    """Divide the sources that are to be divided; a prompt on both sides stays in the test split alone."""
    train, test = splits.split(_rows(accounts, "split"), recipe.test_size, recipe.seed)
    test = test + _rows(accounts, "test")
    tested = {splits.group(row) for row in test}
    in_test = {row["id"] for row in test}
    for account in accounts:
        account.keep(
            lambda row: row["id"] in in_test or splits.group(row) not in tested, "its question is in the test split"
        )
    kept = {row["id"] for account in accounts for row in account.rows}
    return [row for row in train + _rows(accounts, "train") if row["id"] in kept], test


def _rows(accounts: list[Account], part: Part) -> list[Row]:
    return [row for account in accounts if account.part == part for row in account.rows]


def _ledger(accounts: list[Account], train: list[Row], test: list[Row]) -> dict[str, Any]:
    lines = [account.as_dict() for account in accounts]
    dropped: Counter[str] = Counter()
    for line in lines:
        dropped.update(line["dropped"])
        if line["rows_in"] != line["rows_out"] + sum(line["dropped"].values()):
            raise AssertionError(f"the ledger does not add up: {line}")
    ledger = {
        "rows_in": sum(line["rows_in"] for line in lines),
        "rows_out": sum(line["rows_out"] for line in lines),
        "dropped": dict(sorted(dropped.items())),
        "splits": {"train": len(train), "test": len(test)},
        "sources": lines,
    }
    if ledger["rows_out"] != len(train) + len(test):
        raise AssertionError(f"the ledger does not add up: {ledger}")
    return ledger


def _empty(name: str, ledger: dict[str, Any]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in ledger["dropped"].items()) or "none dropped"
    return (
        f"the {name} split is empty: {ledger['rows_in']} rows read, {ledger['rows_out']} left ({reasons}). Loosen the "
        "recipe's filters, change test_size, or add rows."
    )


def summary_lines(ledger: dict[str, Any]) -> Iterator[str]:
    """The ledger in words, a line per source and reason."""
    for line in ledger["sources"]:
        yield f"{line['source']}: {line['rows_in']} rows read, {line['rows_out']} kept"
        for reason, count in line["dropped"].items():
            yield f"  {count} dropped: {reason}"
    yield f"train {ledger['splits']['train']}, test {ledger['splits']['test']}"
