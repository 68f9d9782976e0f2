"""The build of a dataset from a recipe: passes over shards, and decisions between them.

A pass takes every shard through row steps and sketches it for the table steps that follow; these decide, and the next
pass applies their verdicts. Shards are cut only by the sources' records, so the number of processes changes no
result. Finished work stays in ``work``, so a killed build continues. Memory holds a shard for each process and the
sketches of one pass.
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

from align.config.recipe.recipe import Recipe
from align.config.recipe.source_settings import AnnotationsSource, labels
from align.data.annotated import annotation_ledger
from align.data.builds.build_files import finish
from align.data.builds.ledger import Counts, describe_empty_split, make_ledger
from align.data.builds.shards import (
    Pass,
    StoredVerdict,
    Task,
    is_complete,
    is_stored,
    read_shard,
    read_sketches,
    read_summary,
    store_verdict,
)
from align.data.builds.workers import BuildResources, Workers
from align.data.card import mixture_license
from align.data.formats.column_guess import suggest_source
from align.data.rows import take_rows
from align.data.sources import choose_format, identity, read, source_folder
from align.data.steps.split import SPLITS, IdenticalStep, MaxRowsStep, SplitStep, UsableStep
from align.data.steps.step import STEPS, StepContext, Table, TableStep, Verdict, keep_all, start_step
from align.errors import UserError
from align.store.fingerprint import digest

SHARD_ROWS = 10_000
"""Records of a shard. Another number would change results: a reason's examples and the order of rows follow shards."""

NumberedStep = tuple[int, Any]
"""Number of a step in the build, and its settings."""

Progress = Callable[[int, str], None]
"""Called with the rows done in a step and the step's name."""


@dataclass
class Build:
    """One build. ``inputs`` are the folders of artifacts that sources of type ``input`` read."""

    recipe: Recipe
    base: Path
    work: Path
    inputs: tuple[Path, ...] = ()
    resources: BuildResources = field(default_factory=BuildResources)
    progress: Progress | None = None
    counts: Counts = field(default_factory=Counts)
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)
    format_choices: dict[str, str] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    """Seconds of each step, by its number, summed over processes; reading and writing shards under -1."""

    def run(self, output: Path) -> dict[str, Any]:
        """Write the build's Parquet files into ``output`` and return the ledger.

        Raises ``UserError`` for a source or record that cannot be read, and for an empty split, with the counts per
        reason.
        """
        # Sources are identified before anything is read, since the ledger records what the build began with.
        sources = [
            {
                "source": name,
                "type": source.type,
                "part": source.part,
                "license": self._license(source),
                "identity": identity(source, self.base, self.inputs),
                **self._annotators(source),
            }
            for name, source in zip(labels(self.recipe.sources), self.recipe.sources, strict=True)
        ]
        steps = self._steps()
        first = self._first_pass(steps, [str(source["source"]) for source in sources])
        # Step 0 is the conversion of records, so the steps are numbered from 1.
        with Workers(self.resources) as workers:
            last, shards = self._passes(first, deque(enumerate(steps, start=1)), workers)
        # Without shards no row is left. The ledger then says which steps dropped them.
        splits = dict.fromkeys(SPLITS, 0)
        digests: dict[str, str] = {}
        if shards:
            splits, digests = finish(self.work, range(shards), last, output)
        ledger = make_ledger(
            self.counts,
            first.steps,
            sources,
            notes=self.notes,
            splits=splits,
            digests=digests,
            format_choices=self.format_choices,
        )
        # Only now, so the error can quote the counts of the ledger.
        for name in SPLITS:
            if not splits[name] and name != self.recipe.empty_split:
                raise UserError(describe_empty_split(name, ledger))
        return ledger

    def _annotators(self, source: Any) -> dict[str, Any]:
        """Return who annotated and when, by pseudonym, for a source of annotations."""
        if not isinstance(source, AnnotationsSource):
            return {}
        return {"annotators": annotation_ledger(source, self.base)}

    def _license(self, source: Any) -> str | None:
        """Return the license that the recipe states, or the license in the ledger of the artifact that is read."""
        if source.license is not None or source.type not in ("artifact", "input"):
            return source.license  # type: ignore[no-any-return]
        ledger = source_folder(source, self.base, self.inputs) / "ledger.json"
        if not ledger.exists():
            return None
        sources = json.loads(ledger.read_text(encoding="utf-8")).get("sources", [])
        return mixture_license(line.get("license") for line in sources).names[0] if sources else None

    def _first_pass(self, steps: Sequence[Any], sources: Sequence[str]) -> Pass:
        return Pass(
            number=0,
            folder=self.work / "pass-0",
            before=None,
            kind=self.recipe.kind,
            on_error=self.recipe.on_error,
            steps=("read", *(step.type for step in steps)),
            sources=tuple(sources),
            check=not any(step.type == "normalize" for step in self.recipe.steps),
        )

    def _passes(self, spec: Pass, pending: deque[NumberedStep], workers: Workers) -> tuple[Path, int]:
        """Do all passes and the decisions between them; return the folder of the last and its number of shards.

        The number is 0 if no row is left, which ends the build early.
        """
        while True:
            # A pass does row steps and sketches the rows for the table steps that follow. These decide, and the next
            # pass begins with their verdicts.
            row_steps, table_steps = _next_steps(pending)
            spec = replace(spec, row_steps=self._with_context(row_steps), table_steps=self._with_context(table_steps))
            rows = self._run_pass(spec, workers)
            if not sum(rows):
                return spec.folder, 0
            if not table_steps:
                return spec.folder, len(rows)
            verdicts = self._decide(spec, rows)
            number = spec.number + 1
            folder = self.work / f"pass-{number}"
            spec = replace(spec, number=number, folder=folder, before=spec.folder, verdicts=verdicts)

    def _steps(self) -> list[Any]:
        """Return the recipe's steps and those that every build ends with; ``mix`` is last, since it repeats rows."""
        recipe = self.recipe
        # Equal rows go before ``max_rows`` counts, and only rows that stay are split.
        last_steps: list[Any] = [IdenticalStep()]
        if recipe.max_rows is not None:
            last_steps.append(MaxRowsStep(rows=recipe.max_rows))
        last_steps.append(
            SplitStep(
                test_size=recipe.test_size,
                near_duplicates=recipe.near_duplicate_prompts,
                parts=tuple(source.part for source in recipe.sources),
            )
        )
        steps: list[Any] = []
        for step in recipe.steps:
            steps.append(step)
            if step.type == "normalize":
                # Rows were not checked when they were read, since ``normalize`` can mend some of them.
                steps.append(UsableStep())
        # Copies of rows must not count as duplicates, so ``mix`` follows the search for equal rows.
        mix_steps = [step for step in steps if step.type == "mix"]
        return [*(step for step in steps if step.type != "mix"), *last_steps, *mix_steps]

    def _with_context(self, steps: Sequence[NumberedStep]) -> tuple[tuple[int, Any, StepContext], ...]:
        """Return steps with their context, and create the folder of each."""
        with_context = []
        for number, config in steps:
            folder = self.work / f"step-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            context = StepContext(
                kind=self.recipe.kind,
                seed=self.recipe.seed,
                base=self.base,
                work=folder,
                device=self.resources.device,
                inputs=self.inputs,
                models=self.resources.models,
            )
            with_context.append((number, config, context))
        return tuple(with_context)

    def _run_pass(self, spec: Pass, workers: Workers) -> list[int]:
        """Do one pass and return the rows of each shard."""
        spec.folder.mkdir(parents=True, exist_ok=True)
        steps = (*spec.row_steps, *spec.table_steps)
        # Every local worker would load the model anew, so a pass that runs one stays in this process.
        runs_model = any(STEPS[config.type].runs_model for _, config, _ in steps)
        tasks = self._first_tasks(spec) if spec.before is None else self._later_tasks(spec)
        rows: list[int] = []
        step_name = spec.steps[steps[0][0] if steps else 0]
        # Workers report shards in order; everything about one is read from its summary, also after a resumed build.
        for _ in workers.run(spec, tasks, in_this_process=runs_model):
            summary = read_summary(spec.folder, len(rows))
            assert summary is not None
            rows.append(summary.rows)
            self.counts.merge(summary.counts)
            self._add_seconds(summary.seconds)
            if self.progress:
                self.progress(sum(rows), step_name)
        return rows

    def _first_tasks(self, spec: Pass) -> Iterator[Task]:
        """Yield the tasks of the first pass: the sources' records, in order. Records of complete shards are skipped."""
        shard = 0
        for number, source in enumerate(self.recipe.sources):
            records = read(source, self.base, self.inputs, self.recipe.seed)
            try:
                choice = choose_format(source, records, self.recipe.kind)
            except UserError as error:
                raise UserError(f"{error}{suggest_source(source, self.base, self.recipe.kind)}") from None
            if self.recipe.lacks_pairs(choice.format.form):
                raise UserError(
                    f"{source.label}: format {choice.format.form} has several answers to a prompt; add the step `type: "
                    "pairs`, which makes pairs of them."
                )
            if choice.reason:
                self.format_choices[spec.sources[number]] = choice.reason
            while chunk := tuple(itertools.islice(choice.records, SHARD_ROWS)):
                if is_complete(spec.folder, shard):
                    # The source is a stream: even on resume its records must be read to reach the next shard's.
                    chunk = ()  # its records had to be read past, but need not be sent to a worker
                yield Task(shard, 0, number, choice.format, chunk)
                shard += 1

    def _later_tasks(self, spec: Pass) -> Iterator[Task]:
        """Yield the tasks of a later pass: the shards of the one before."""
        assert spec.before is not None
        # ``start`` counts rows over all shards, since a verdict is one array over all rows.
        start = 0
        for shard in itertools.count():
            summary = read_summary(spec.before, shard)
            if summary is None:
                return
            yield Task(shard, start)
            start += summary.rows

    def _decide(self, spec: Pass, rows: list[int]) -> tuple[tuple[int, Path], ...]:
        """Let the pass's table steps decide, in order; return the folders of their verdicts."""
        folders = tuple((number, spec.folder / f"verdict-{number}") for number, _, _ in spec.table_steps)
        # A resumed build reads the verdicts that are complete instead of deciding again.
        if not all(is_stored(folder) for _, folder in folders):
            sketches = read_sketches(spec.folder, len(rows))
            alive = np.ones(sum(rows), dtype=bool)
            added_columns: dict[str, np.ndarray] = {}
            source = sketches.pop("source", np.zeros(0, dtype=np.int32))
            for (number, config, context), (_, folder) in zip(spec.table_steps, folders, strict=True):
                step: TableStep = start_step(config, context)
                prefix = f"{number}."
                # ``pop``, so the sketches of a step are freed once it has decided.
                columns = {
                    name.removeprefix(prefix): sketches.pop(name) for name in list(sketches) if name.startswith(prefix)
                }
                reader = _RowReader(spec.folder, rows)
                table = Table(
                    columns=columns | added_columns,
                    alive=alive.copy(),
                    source=source,
                    sources=list(spec.sources),
                    row=reader,
                    many=reader.many,
                )
                started = time.perf_counter()
                verdict = step.decide(table) if alive.any() else Verdict(keep_all(len(table)))
                self._add_seconds({number: time.perf_counter() - started})
                self._store(spec, rows, folder, verdict)
                # A later step of the same pass sees which rows are gone, and the columns that were added.
                alive &= verdict.code < 0
                added_columns |= verdict.columns
                if self.progress:
                    self.progress(int(alive.sum()), spec.steps[number])
        for number, folder in folders:
            self.notes[number] = StoredVerdict(folder, slice(0, 0)).notes
        return folders

    def _add_seconds(self, seconds: dict[int, float]) -> None:
        for number, value in seconds.items():
            self.seconds[number] = self.seconds.get(number, 0.0) + value

    def _store(self, spec: Pass, rows: list[int], folder: Path, verdict: Verdict) -> None:
        # Only rows that stand for a dropped one are named, so the verdict stays small.
        stand_ins = None
        if verdict.instead is not None and (verdict.instead >= 0).any():
            places = np.unique(verdict.instead[verdict.instead >= 0])
            stand_ins = list(_read_names(spec.folder, rows, places))
        store_verdict(folder, verdict, stand_ins)


def build(
    recipe: Recipe,
    base: Path,
    work: Path,
    output: Path,
    *,
    inputs: Sequence[Path] = (),
    resources: BuildResources | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build ``recipe`` into ``output``; see ``Build``. Resumes an earlier attempt at the same recipe."""
    # Work of another recipe must not be mixed up with this one, so the folder is named after its content.
    work = work / digest(recipe.model_dump(mode="json"))[:16]
    return Build(recipe, base, work, tuple(inputs), resources or BuildResources(), progress).run(output)


def _next_steps(pending: deque[NumberedStep]) -> tuple[list[NumberedStep], list[NumberedStep]]:
    """Take the steps of the next pass from ``pending``: row steps, then the table steps that directly follow."""
    row_steps: list[NumberedStep] = []
    table_steps: list[NumberedStep] = []
    while pending:
        # A row step behind a table step needs its verdict, so it waits for the next pass.
        needs_all_rows = STEPS[pending[0][1].type].needs_all_rows
        if table_steps and not needs_all_rows:
            break
        (table_steps if needs_all_rows else row_steps).append(pending.popleft())
    return row_steps, table_steps


class _RowReader:
    """Reads a row by its number among all rows; caches the last shard."""

    def __init__(self, folder: Path, rows: list[int]) -> None:
        self.folder = folder
        self.ends = np.cumsum(rows)
        self.shard = -1
        self.cached_rows: list[Any] = []

    def __call__(self, place: int) -> Any:
        shard = int(np.searchsorted(self.ends, place, side="right"))
        if shard != self.shard:
            self.cached_rows = read_shard(self.folder, shard)
            self.shard = shard
        start = int(self.ends[shard - 1]) if shard else 0
        return self.cached_rows[place - start]

    def many(self, places: np.ndarray) -> Iterator[Any]:
        """Yield the rows with these numbers, which ascend; each shard is read once."""
        start = 0
        # Numbers ascend, so one scan over the shards reads each of them at most once.
        for shard, end in enumerate(self.ends):
            inside = places[(places >= start) & (places < end)] - start
            if len(inside):
                yield from take_rows(self.folder / f"{shard:05d}.parquet", inside)
            start = int(end)


def _read_names(folder: Path, rows: list[int], places: np.ndarray) -> Iterator[dict[str, str]]:
    """Yield id and place of the rows with these numbers, which ascend."""
    start = 0
    for shard, count in enumerate(rows):
        inside = places[(places >= start) & (places < start + count)] - start
        if len(inside):
            table = pq.read_table(folder / f"{shard:05d}.parquet", columns=["id", "_where"]).take(inside)
            for name, where in zip(*(column.to_pylist() for column in table.columns), strict=True):
                yield {"id": name, "where": where}
        start += count
