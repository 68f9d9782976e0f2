"""From a recipe to a dataset: passes over shards, verdicts between them, and what comes out of it all.

A pass takes every shard through row steps and sketches it for the table steps behind them; these decide, and the next
pass applies what they said. Shards are cut where the sources' records are, whatever the number of processes, which so
changes nothing. All that is finished stays in ``work``, so a killed build goes on. Memory holds a shard for each
process and the sketches of one pass.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from align.data.finish import finish
from align.data.ledger import Counts, SourceLine, empty_split, make_ledger
from align.data.licenses import of_mixture
from align.data.recipe import Recipe
from align.data.rows import take_rows
from align.data.shards import (
    Pass,
    Task,
    finished,
    is_whole,
    read_shard,
    read_sketches,
)
from align.data.source_configs import labels
from align.data.sources import choose_format, identity, read, source_folder
from align.data.steps.base import StepContext, Table, TableStep, Verdict, keep_all
from align.data.steps.split import SPLITS, Identical, MaxRows, Split, Usable
from align.data.verdicts import StoredVerdict, is_stored, store_verdict
from align.data.workers import Machine, Workers
from align.errors import UserError
from align.store.fingerprint import digest

SHARD_ROWS = 10_000
"""Records of a shard; part of what a build means, since a reason's examples and the output's order follow shards."""

Progress = Callable[[int, str], None]
"""Rows done in a step, and the step's name."""


@dataclass
class Build:
    """One build. ``inputs`` are folders of artifacts for sources of type ``input``."""

    recipe: Recipe
    base: Path
    work: Path
    inputs: tuple[Path, ...] = ()
    machine: Machine = field(default_factory=Machine)
    progress: Progress | None = None
    counts: Counts = field(default_factory=Counts)
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)
    format_choices: dict[str, str] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    """Seconds of each step, by its number, summed over processes; reading and writing shards under -1."""

    def run(self, output: Path) -> dict[str, Any]:
        """Write the build's Parquet files into ``output``; returns the ledger.

        Raises ``UserError`` for what cannot be read, and for a split that ends up empty, with the counts per reason.
        """
        lines = [
            SourceLine(name, source.type, source.part, self._license(source), identity(source, self.base, self.inputs))
            for name, source in zip(labels(self.recipe.sources), self.recipe.sources, strict=True)
        ]
        steps = self._steps()
        first = self._first_pass(steps, [line.name for line in lines])
        with Workers(self.machine) as workers:
            last, shards = self._passes(first, deque(enumerate(steps, start=1)), workers)
        splits, digests = dict.fromkeys(SPLITS, 0), dict[str, str]()
        if shards:
            splits, digests = finish(self.work, range(shards), last, output)
        ledger = make_ledger(self.counts, first.steps, lines, self.notes, splits, digests, self.format_choices)
        for name in SPLITS:
            if not splits[name]:
                raise UserError(empty_split(name, ledger))
        return ledger

    def _license(self, source: Any) -> str | None:
        """What the recipe says, or what the ledger of an earlier build says of it."""
        if source.license is not None or source.type not in ("artifact", "input"):
            return source.license  # type: ignore[no-any-return]
        ledger = source_folder(source, self.base, self.inputs) / "ledger.json"
        if not ledger.exists():
            return None
        found = json.loads(ledger.read_text(encoding="utf-8")).get("sources", [])
        return of_mixture(line.get("license") for line in found).names[0] if found else None

    def _first_pass(self, steps: Sequence[Any], sources: Sequence[str]) -> Pass:
        return Pass(
            number=0,
            folder=self.work / "pass-0",
            before=None,
            kind=self.recipe.kind,
            on_error=self.recipe.on_error,
            steps=("read", *(step.type for step in steps)),
            sources=tuple(sources),
            options=tuple(source.options for source in self.recipe.sources),
            check=not any(step.type == "normalize" for step in self.recipe.steps),
        )

    def _passes(self, spec: Pass, pending: deque[tuple[int, Any]], workers: Workers) -> tuple[Path, int]:
        """All passes and the verdicts between them; returns the folder of the last and its shards.

        There are no shards where no row is left, and no pass after that.
        """
        while True:
            row_steps, table_steps = _next(pending)
            spec = replace(spec, row_steps=self._started(row_steps), table_steps=self._started(table_steps))
            rows = self._pass(spec, workers)
            if not sum(rows):
                return spec.folder, 0
            if not table_steps:
                return spec.folder, len(rows)
            verdicts = self._decide(spec, rows)
            number = spec.number + 1
            folder = self.work / f"pass-{number}"
            spec = replace(spec, number=number, folder=folder, before=spec.folder, verdicts=verdicts)

    def _steps(self) -> list[Any]:
        """The recipe's steps and those that every build ends with; ``mix`` comes last, for it repeats rows."""
        recipe = self.recipe
        ends: list[Any] = [Identical()]
        if recipe.max_rows is not None:
            ends.append(MaxRows(rows=recipe.max_rows))
        ends.append(
            Split(
                test_size=recipe.test_size,
                near_duplicates=recipe.near_duplicate_prompts,
                parts=tuple(source.part for source in recipe.sources),
            )
        )
        given: list[Any] = []
        for step in recipe.steps:
            given.append(step)
            if step.type == "normalize":  # which mends rows that would have been dropped at once
                given.append(Usable())
        mixing = [step for step in given if step.type == "mix"]
        return [*(step for step in given if step.type != "mix"), *ends, *mixing]

    def _started(self, steps: Sequence[tuple[int, Any]]) -> tuple[tuple[int, Any, StepContext], ...]:
        made = []
        for number, config in steps:
            folder = self.work / f"step-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            recipe = self.recipe
            context = StepContext(recipe.kind, recipe.seed, self.base, folder, self.machine.device, self.inputs)
            made.append((number, config, context))
        return tuple(made)

    def _pass(self, spec: Pass, workers: Workers) -> list[int]:
        """Do one pass; returns the rows of each shard."""
        spec.folder.mkdir(parents=True, exist_ok=True)
        alone = any(getattr(config, "alone", False) for _, config, _ in (*spec.row_steps, *spec.table_steps))
        tasks = self._read(spec) if spec.before is None else self._again(spec)
        done = 0
        rows: list[int] = []
        step = spec.steps[(spec.row_steps or spec.table_steps or ((0,),))[0][0]]
        for _ in workers.run(spec, tasks, alone):
            found = finished(spec.folder, len(rows))
            assert found is not None
            rows.append(found.rows)
            self.counts.merge(found.counts)
            self._spent(found.seconds)
            done += found.rows
            if self.progress:
                self.progress(done, step)
        return rows

    def _read(self, spec: Pass) -> Iterator[Task]:
        """Tasks of the first pass: the sources' records, in order. Finished shards are read past."""
        shard = 0
        for at, source in enumerate(self.recipe.sources):
            records = read(source, self.base, self.inputs, self.recipe.seed)
            form, why, records = choose_format(source, records, self.recipe.kind)
            if why:
                self.format_choices[spec.sources[at]] = why
            while chunk := tuple(itertools.islice(records, SHARD_ROWS)):
                if is_whole(spec.folder, shard):
                    chunk = ()  # done before; what matters is that its records are behind us
                yield Task(shard, 0, at, form, chunk)
                shard += 1

    def _again(self, spec: Pass) -> Iterator[Task]:
        """Tasks of a later pass: the shards of the one before."""
        assert spec.before is not None
        start = 0
        for shard in itertools.count():
            found = finished(spec.before, shard)
            if found is None:
                return
            yield Task(shard, start)
            start += found.rows

    def _decide(self, spec: Pass, rows: list[int]) -> tuple[tuple[int, Path], ...]:
        """Have the pass's table steps decide, in order; returns where their verdicts are."""
        folders = tuple((number, spec.folder / f"verdict-{number}") for number, _, _ in spec.table_steps)
        if not all(is_stored(folder) for _, folder in folders):
            sketches = read_sketches(spec.folder, len(rows))
            alive = np.ones(sum(rows), dtype=bool)
            given: dict[str, np.ndarray] = {}
            source = sketches.pop("source", np.zeros(0, dtype=np.int32))
            for (number, config, context), (_, folder) in zip(spec.table_steps, folders, strict=True):
                step: TableStep = config.start(context)
                mine = {name: sketches.pop(name) for name in list(sketches) if name.startswith(f"{number}.")}
                columns = {name.split(".", 1)[1]: column for name, column in mine.items()}
                read = _Rows(spec.folder, rows)
                table = Table(columns | given, alive.copy(), source, list(spec.sources), read, read.many)
                began = time.perf_counter()
                verdict = step.decide(table) if alive.any() else Verdict(keep_all(len(table)))
                self._spent({number: time.perf_counter() - began})
                self._store(spec, rows, folder, verdict)
                alive &= verdict.code < 0
                given |= verdict.columns
                if self.progress:
                    self.progress(int(alive.sum()), spec.steps[number])
        for number, folder in folders:
            self.notes[number] = StoredVerdict(folder, slice(0, 0)).notes
        return folders

    def _spent(self, seconds: dict[int, float]) -> None:
        for number, value in seconds.items():
            self.seconds[number] = self.seconds.get(number, 0.0) + value

    def _store(self, spec: Pass, rows: list[int], folder: Path, verdict: Verdict) -> None:
        stand_ins = None
        if verdict.instead is not None and (verdict.instead >= 0).any():
            places = np.unique(verdict.instead[verdict.instead >= 0])
            stand_ins = list(_names(spec.folder, rows, places))
        store_verdict(folder, verdict, stand_ins)


def build(
    recipe: Recipe,
    base: Path,
    work: Path,
    output: Path,
    inputs: Sequence[Path] = (),
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build ``recipe`` into ``output``; see ``Build``. Work that an earlier attempt at the same recipe left is used."""
    work = work / digest(recipe.model_dump(mode="json"))[:16]
    return Build(recipe, base, work, tuple(inputs), machine or Machine(), progress).run(output)


def _next(pending: deque[tuple[int, Any]]) -> tuple[list[tuple[int, Any]], list[tuple[int, Any]]]:
    """The steps of the next pass: row steps, then table steps."""
    row_steps: list[tuple[int, Any]] = []
    table_steps: list[tuple[int, Any]] = []
    while pending and (pending[0][1].decides or not table_steps):
        (table_steps if pending[0][1].decides else row_steps).append(pending.popleft())
    return row_steps, table_steps


class _Rows:
    """Row by its number among all; keeps the shard last read."""

    def __init__(self, folder: Path, rows: list[int]) -> None:
        self.folder, self.ends = folder, np.cumsum(rows)
        self.shard, self.held = -1, []  # type: int, list[Any]

    def __call__(self, place: int) -> Any:
        shard = int(np.searchsorted(self.ends, place, side="right"))
        if shard != self.shard:
            self.shard, self.held = shard, read_shard(self.folder, shard)
        start = int(self.ends[shard - 1]) if shard else 0
        return self.held[place - start]

    def many(self, places: np.ndarray) -> Iterator[Any]:
        """The rows with these numbers, which ascend; each shard is read once."""
        start = 0
        for shard, end in enumerate(self.ends):
            inside = places[(places >= start) & (places < end)] - start
            if len(inside):
                yield from take_rows(self.folder / f"{shard:05d}.parquet", inside)
            start = int(end)


def _names(folder: Path, rows: list[int], places: np.ndarray) -> Iterator[dict[str, str]]:
    """Id and place of the rows with these numbers, which ascend."""
    start = 0
    for shard, count in enumerate(rows):
        inside = places[(places >= start) & (places < start + count)] - start
        if len(inside):
            found = pq.read_table(folder / f"{shard:05d}.parquet", columns=["id", "_where"]).take(inside)
            for name, where in zip(*(column.to_pylist() for column in found.columns), strict=True):
                yield {"id": name, "where": where}
        start += count
