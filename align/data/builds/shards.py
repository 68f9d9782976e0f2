"""One pass over the shards of a build: apply verdicts, run the row steps, sketch rows for the next verdicts.

A shard's files (rows, dropped rows, sketches) are complete once its ``.json`` exists, which is written last: after a
kill, a build repeats only the other shards. Runs in worker processes, which share no state; each shard depends only on
its input. ``build.py`` decides which passes there are, and takes the decisions between them.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align.data.builds.ledger import Counts
from align.data.formats import SourceFormat, convert
from align.data.formats.reading import Item
from align.data.rows import BadRecord, Dropped, Row, content_digest, read_rows, row_id, write_rows
from align.data.steps.split import ID_TAKEN
from align.data.steps.step import RowStep, StepContext, TableStep, Verdict, start_step
from align.errors import UserError
from align.store.fingerprint import file_digest
from align.store.json_files import DamagedFile, parse_sealed, write_sealed

STORAGE = -1
"""Number under which the seconds of reading and writing shards are counted."""
EXCERPT = 200
"""Characters of a dropped row in the ledger."""
DROPPED = pa.schema([(name, pa.string()) for name in ("where", "source", "step", "reason", "detail", "row")])


@dataclass(frozen=True)
class Pass:
    """The work on each shard. ``table_steps`` and ``row_steps`` are (number, settings, context)."""

    number: int
    folder: Path
    before: Path | None
    """Folder of the pass before; None for the first pass, which reads and converts records."""
    kind: str
    on_error: str
    steps: tuple[str, ...]
    """Names of all steps of the build."""
    sources: tuple[str, ...]
    check: bool
    """True to check converted rows at once, False if a later step does."""
    verdicts: tuple[tuple[int, Path], ...] = ()
    row_steps: tuple[tuple[int, Any, StepContext], ...] = ()
    table_steps: tuple[tuple[int, Any, StepContext], ...] = ()


@dataclass(frozen=True)
class Task:
    """One shard: its number, the number of its first row among all rows, and in the first pass its records."""

    shard: int
    start: int
    source: int = 0
    format: SourceFormat = field(default_factory=lambda: SourceFormat("rows"))
    records: tuple[Item, ...] = ()


class Worker:
    """Does the tasks of one pass."""

    def __init__(self, spec: Pass) -> None:
        self.spec = spec
        self.row_steps: list[tuple[int, RowStep]] = [
            (number, start_step(config, context)) for number, config, context in spec.row_steps
        ]
        self.table_steps: list[tuple[int, TableStep]] = [
            (number, start_step(config, context)) for number, config, context in spec.table_steps
        ]

    def run(self, task: Task) -> int:
        """Do one shard and write its files; return its number of rows."""
        shard = _Shard(self.spec)
        # 1. The rows: converted from records in the first pass, later those that the verdicts leave.
        if self.spec.before is None:
            with shard.timed(0):
                rows = shard.convert(task)
        else:
            with shard.timed(STORAGE):
                rows = shard.apply_verdicts(read_shard(self.spec.before, task.shard), task.start)
        # 2. The row steps, each on what the one before returned.
        for number, step in self.row_steps:
            with shard.timed(number):
                rows = shard.apply(number, step, rows)
        # 3. The sketches, from which the table steps decide after the pass.
        sketches = {"source": np.array([row["_source"] for row in rows], dtype=np.int32)}
        # Columns are stored under the number of their step, so several steps can share a pass.
        for number, table_step in self.table_steps:
            with shard.timed(number):
                sketches |= {f"{number}.{name}": column for name, column in table_step.sketch(rows).items()}
        write_shard(self.spec.folder, task.shard, rows, shard, sketches)
        return len(rows)


class _Shard:
    """One shard on its way through a pass: counts, dropped rows and seconds."""

    def __init__(self, spec: Pass) -> None:
        self.spec = spec
        self.counts = Counts()
        self.dropped: list[dict[str, str]] = []
        self.seconds: dict[int, float] = {}

    @contextlib.contextmanager
    def timed(self, step: int) -> Iterator[None]:
        """Count the seconds inside for a step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    def convert(self, task: Task) -> list[Row]:
        """Return the rows of the shard's records; step 0."""
        converted: list[Row] = []
        spec = self.spec
        for record in task.records:
            tally = self.counts.tallies[0, task.source]
            tally.rows_in += 1
            if isinstance(record, BadRecord):
                self._drop_bad(task, record, {})
                continue
            where, value = record
            internal = {"_where": where, "_source": task.source}
            try:
                rows = convert(
                    value,
                    task.format,
                    where,
                    spec.kind,
                    check=spec.check,
                    usage=self.counts.usage[task.source],
                )
            except BadRecord as error:
                self._drop_bad(task, error, value)
                continue
            # A record counts as one row; every further row is an added row, so the ledger adds up.
            rows = rows or [Dropped("nothing in it to use")]
            tally.added += len(rows) - 1
            for row in rows:
                if isinstance(row, Dropped):
                    self._drop(0, {**internal, "record": value}, row)
                else:
                    tally.rows_out += 1
                    converted.append({"source": spec.sources[task.source], **row, **internal})
        return converted

    def _drop_bad(self, task: Task, error: BadRecord, value: dict[str, Any]) -> None:
        if self.spec.on_error == "stop":
            raise UserError(f"{error}\nTo leave such records out and count them, write on_error: drop in the recipe.")
        row = {"_where": error.where, "_source": task.source, "record": value}
        self._drop(0, row, Dropped("unreadable", {"error": error.problem}))

    def apply(self, number: int, step: RowStep, rows: list[Row]) -> list[Row]:
        """Return the rows after one row step."""
        results = step.apply(rows)
        remaining: list[Row] = []
        for row, result in zip(rows, results, strict=True):
            tally = self.counts.tallies[number, row["_source"]]
            tally.rows_in += 1
            if isinstance(result, Dropped):
                self._drop(number, row, result)
                continue
            if isinstance(result, list):
                tally.added += len(result) - 1
                tally.rows_out += len(result)
                remaining += [{**new_row, "id": row_id(new_row)} for new_row in result]
                continue
            tally.rows_out += 1
            # Steps return the same object for an unchanged row, so identity is enough to count changes.
            if result is not row:
                tally.changed += 1
                result = {**result, "id": row_id(result)}
            remaining.append(result)
        return remaining

    def apply_verdicts(self, rows: list[Row], start: int) -> list[Row]:
        """Return the rows after the table steps' verdicts on them; ``start`` is the first row's number among all."""
        part = slice(start, start + len(rows))
        # Each row keeps its place in the stored shard, by which all verdicts of the pass count.
        alive: list[tuple[int, Row]] = list(enumerate(rows))
        for number, folder in self.spec.verdicts:
            verdict = StoredVerdict(folder, part)
            remaining = []
            for index, row in alive:
                tally = self.counts.tallies[number, row["_source"]]
                tally.rows_in += 1
                if verdict.code[index] >= 0:
                    detail = verdict.detail(index)
                    self._drop(number, row, Dropped(verdict.reasons[verdict.code[index]], detail))
                    continue
                # The first copy keeps the id, later copies (``mix``) get a number.
                if verdict.columns:
                    row = {**row, **verdict.fields(index)}
                if row.pop(ID_TAKEN, False):
                    row["id"] = content_digest(row).hex()[:16]
                times = verdict.times(index)
                tally.added += times - 1
                tally.rows_out += times
                remaining.append((index, row))
                remaining += [(index, {**row, "id": f"{row['id']}-{copy}"}) for copy in range(2, times + 1)]
            alive = remaining
        return [row for _, row in alive]

    def _drop(self, step: int, row: Row, dropped: Dropped) -> None:
        text = json.dumps(_without_internal_fields(row), ensure_ascii=False, default=str)
        example = {"where": row["_where"], "id": row.get("id", ""), "text": text[:EXCERPT], "detail": dropped.detail}
        self.counts.drop(step, row["_source"], dropped.reason, example)
        self.dropped.append(
            {
                "where": row["_where"],
                "source": self.spec.sources[row["_source"]],
                "step": f"{step} {self.spec.steps[step]}",
                "reason": dropped.reason,
                "detail": json.dumps(dropped.detail, ensure_ascii=False, sort_keys=True),
                "row": text,
            }
        )


def _without_internal_fields(row: Row) -> Row:
    return {name: value for name, value in row.items() if not name.startswith("_")}


def write_shard(folder: Path, number: int, rows: Sequence[Row], shard: _Shard, sketches: dict[str, np.ndarray]) -> None:
    """Write rows, dropped rows and sketches, then the counts, whose file shows that the others are complete."""
    with shard.timed(STORAGE):
        write_rows(folder / f"{number:05d}.parquet", list(rows))
        pq.write_table(pa.Table.from_pylist(shard.dropped, DROPPED), folder / f"{number:05d}.dropped.parquet")
        np.savez(folder / f"{number:05d}.npz", **sketches)  # type: ignore[arg-type]
    # Digests tell a shard that was cut off, or damaged on disk, from a complete one.
    digests = {suffix: file_digest(folder / f"{number:05d}{suffix}") for suffix in SHARD_SUFFIXES}
    summary = {"rows": len(rows), "seconds": shard.seconds, "digests": digests, **shard.counts.to_json()}
    write_sealed(folder / f"{number:05d}.json", summary)


SHARD_SUFFIXES = (".parquet", ".dropped.parquet", ".npz")
"""Suffixes of a shard's files, in addition to the ``.json`` that completes it."""


def read_shard(folder: Path, shard: int) -> list[Row]:
    """Return a shard's rows, without their empty fields."""
    # Parquet fills fields that only other rows have with None.
    rows = read_rows(folder / f"{shard:05d}.parquet")
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


@dataclass(frozen=True)
class ShardSummary:
    """The contents of a finished shard's ``.json``."""

    rows: int
    counts: Counts
    seconds: dict[int, float]
    digests: dict[str, str]
    """Digests of its files, by suffix."""


def read_summary(folder: Path, shard: int) -> ShardSummary | None:
    """Return a shard's summary; None for a shard that is not finished, or whose summary is damaged."""
    try:
        summary = parse_sealed((folder / f"{shard:05d}.json").read_bytes())
    except (FileNotFoundError, DamagedFile):
        return None
    seconds = {int(step): value for step, value in summary["seconds"].items()}
    return ShardSummary(summary["rows"], Counts.from_json(summary), seconds, summary["digests"])


def discard_summary(folder: Path, shard: int) -> None:
    """Delete a shard's summary, without which it is not finished."""
    (folder / f"{shard:05d}.json").unlink(missing_ok=True)


def is_complete(folder: Path, shard: int) -> bool:
    """Return True if a shard is finished and its files are intact; any other shard is done again."""
    summary = read_summary(folder, shard)
    if summary is None:
        return False
    try:
        return all(file_digest(folder / f"{shard:05d}{suffix}") == digest for suffix, digest in summary.digests.items())
    except FileNotFoundError:
        return False


def read_sketches(folder: Path, shards: int) -> dict[str, np.ndarray]:
    """Return each named array over all rows; columns are joined one by one to save memory."""
    # Memory-friendly: npz files are lazy, so each column is loaded when it is joined.
    files = [np.load(folder / f"{shard:05d}.npz", allow_pickle=False) for shard in range(shards)]
    try:
        return {name: np.concatenate([file[name] for file in files]) for name in files[0].files} if files else {}
    finally:
        for file in files:
            file.close()


def store_verdict(folder: Path, verdict: Verdict, stand_ins: list[dict[str, str]] | None) -> None:
    """Write a verdict for the workers of the next pass, ``verdict.json`` last.

    ``stand_ins`` has a description of each row that ``instead`` points to, in the order of ``np.unique``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "code.npy", verdict.code)
    if verdict.times is not None:
        np.save(folder / "times.npy", verdict.times)
    for name, column in verdict.columns.items():
        np.save(folder / f"column-{name}.npy", column)
    # ``instead`` is stored as an index into the stand-ins, which are few.
    if stand_ins is not None and verdict.instead is not None:
        places = np.unique(verdict.instead[verdict.instead >= 0])
        np.save(folder / "instead.npy", np.where(verdict.instead >= 0, np.searchsorted(places, verdict.instead), -1))
        pq.write_table(pa.Table.from_pylist(stand_ins), folder / "stand_ins.parquet")
    if verdict.details:
        places, details = zip(*sorted(verdict.details.items()), strict=True)
        texts = [json.dumps(detail, ensure_ascii=False) for detail in details]
        pq.write_table(pa.table({"row": pa.array(places, pa.int64()), "detail": texts}), folder / "details.parquet")
    # The summary is written last and covers all other files, so a verdict is complete or absent.
    digests = {path.name: file_digest(path) for path in sorted(folder.glob("*.npy")) + sorted(folder.glob("*.parquet"))}
    summary = {
        "reasons": verdict.reasons,
        "columns": sorted(verdict.columns),
        "notes": verdict.notes,
        "digests": digests,
    }
    write_sealed(folder / "verdict.json", summary)


def is_stored(folder: Path) -> bool:
    """Return True for a complete verdict in ``folder``; a damaged one is decided again."""
    try:
        digests = parse_sealed((folder / "verdict.json").read_bytes())["digests"]
        return all(file_digest(folder / name) == digest for name, digest in digests.items())
    except (FileNotFoundError, DamagedFile):
        return False


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "verdict.json"
    try:
        return parse_sealed(path.read_bytes())
    except DamagedFile as error:
        raise UserError(f"{path}: damaged: it {error}. Run again to repeat the decision.") from None


class StoredVerdict:
    """The part of a stored verdict that is about some of the rows."""

    def __init__(self, folder: Path, part: slice) -> None:
        summary = _read_summary(folder)
        self.reasons: list[str] = summary["reasons"]
        self.notes: dict[str, Any] = summary["notes"]
        self.code = self._load(folder / "code.npy", part)
        self.columns = {name: self._load(folder / f"column-{name}.npy", part) for name in summary["columns"]}
        self._times = self._load(folder / "times.npy", part) if (folder / "times.npy").exists() else None
        self._instead = self._load(folder / "instead.npy", part) if (folder / "instead.npy").exists() else None
        self._stand_ins = pq.read_table(folder / "stand_ins.parquet") if self._instead is not None else None
        self._details = self._read_details(folder / "details.parquet", part)

    @staticmethod
    def _load(path: Path, part: slice) -> np.ndarray:
        # Memory-mapped: a worker reads only the part of its shard.
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[part])

    @staticmethod
    def _read_details(path: Path, part: slice) -> dict[int, dict[str, Any]]:
        if not path.exists():
            return {}
        # Parquet filters row groups, so a worker decodes only the details of the shard.
        inside = (pc.field("row") >= part.start) & (pc.field("row") < part.stop)
        lines = pq.read_table(path, filters=inside).to_pylist()
        return {line["row"] - part.start: json.loads(line["detail"]) for line in lines}

    def times(self, row: int) -> int:
        """Return the number of copies of a row."""
        return 1 if self._times is None else int(self._times[row])

    def fields(self, row: int) -> dict[str, Any]:
        """Return the fields to add to a kept row."""
        return {name: column[row].item() for name, column in self.columns.items()}

    def detail(self, row: int) -> dict[str, Any]:
        """Return the details of a dropped row; ``instead`` describes the row that stands for it."""
        detail = self._details.get(row, {})
        if self._instead is None or self._stand_ins is None or self._instead[row] < 0:
            return detail
        return {**detail, "instead": self._stand_ins.slice(int(self._instead[row]), 1).to_pylist()[0]}
