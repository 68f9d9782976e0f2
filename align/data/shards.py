"""One pass over the shards of a build: verdicts applied, rows through their steps, sketches for the next verdicts.

A shard's files (rows, dropped rows, sketches) are whole once its ``.json`` is there, which is written last: a killed
build does only the others again. Runs in worker processes, which share nothing; each shard depends on its input alone.
Left out: which passes there are, and what is decided between them (``build.py``).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.data.formats import Form, FormatOptions, convert
from align.data.ledger import Counts
from align.data.reading import Item
from align.data.records import BadRecord
from align.data.rows import Dropped, Row, content_digest, read_rows, row_id, write_rows
from align.data.steps.base import RowStep, StepContext, TableStep
from align.data.steps.split import ID_TAKEN
from align.data.verdicts import StoredVerdict
from align.errors import UserError
from align.store.fingerprint import file_digest
from align.store.json_files import DamagedFile, parse_sealed, write_sealed

STORAGE = -1
"""Where the seconds of reading and writing shards are counted."""
EXCERPT = 200
"""Characters of a dropped row in the ledger."""
DROPPED = pa.schema([(name, pa.string()) for name in ("where", "source", "step", "reason", "detail", "row")])


@dataclass(frozen=True)
class Pass:
    """What is done to each shard. ``table_steps`` and ``row_steps`` are (number, settings, context)."""

    number: int
    folder: Path
    before: Path | None
    """The folder of the pass before; None where records are read and converted."""
    kind: str
    on_error: str
    steps: tuple[str, ...]
    """Names of all steps of the build."""
    sources: tuple[str, ...]
    options: tuple[FormatOptions, ...]
    """Of each source."""
    check: bool
    """Whether converted rows are checked at once, or later, by a step."""
    verdicts: tuple[tuple[int, Path], ...] = ()
    row_steps: tuple[tuple[int, Any, StepContext], ...] = ()
    table_steps: tuple[tuple[int, Any, StepContext], ...] = ()


@dataclass(frozen=True)
class Task:
    """One shard: its number, where its rows start among all rows, and, of the first pass, its records."""

    shard: int
    start: int
    source: int = 0
    form: Form = "rows"
    records: tuple[Item, ...] = ()


class Worker:
    """Does tasks of one pass."""

    def __init__(self, spec: Pass) -> None:
        self.spec = spec
        self.row_steps: list[tuple[int, RowStep]] = [(n, config.start(at)) for n, config, at in spec.row_steps]
        self.table_steps: list[tuple[int, TableStep]] = [(n, config.start(at)) for n, config, at in spec.table_steps]

    def run(self, task: Task) -> int:
        """Do one shard and write its files; returns how many rows it has now."""
        passage = _Passage(self.spec)
        with passage.timed(STORAGE):
            before = [] if self.spec.before is None else read_shard(self.spec.before, task.shard)
        with passage.timed(0 if self.spec.before is None else STORAGE):
            rows = passage.convert(task) if self.spec.before is None else passage.judge(before, task.start)
        for number, step in self.row_steps:
            with passage.timed(number):
                rows = passage.apply(number, step, rows)
        sketches = {"source": np.array([row["_source"] for row in rows], dtype=np.int32)}
        for number, decider in self.table_steps:
            with passage.timed(number):
                sketches |= {f"{number}.{name}": column for name, column in decider.sketch(rows).items()}
        write_shard(self.spec.folder, task.shard, rows, passage, sketches)
        return len(rows)


class _Passage:
    """Counts and dropped rows of one shard."""

    def __init__(self, spec: Pass) -> None:
        self.spec = spec
        self.counts = Counts()
        self.dropped: list[dict[str, str]] = []
        self.seconds: dict[int, float] = {}

    @contextlib.contextmanager
    def timed(self, step: int) -> Iterator[None]:
        """Count what happens inside as seconds of a step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    def convert(self, task: Task) -> list[Row]:
        """Rows of the shard's records; step 0."""
        made: list[Row] = []
        spec = self.spec
        for record in task.records:
            tally = self.counts.tallies[0, task.source]
            tally.rows_in += 1
            if isinstance(record, BadRecord):
                self._bad(task, record, {})
                continue
            where, value = record
            inside = {"_where": where, "_source": task.source}
            try:
                found = convert(
                    value, task.form, where, spec.kind, spec.options[task.source], spec.check,
                    self.counts.unused[task.source],
                )  # fmt: skip
            except BadRecord as error:
                self._bad(task, error, value)
                continue
            found = found or [Dropped("nothing in it to use")]
            tally.added += len(found) - 1
            for row in found:
                if isinstance(row, Dropped):
                    self._drop(0, {**inside, "record": value}, row)
                else:
                    tally.rows_out += 1
                    made.append({"source": spec.sources[task.source], **row, **inside})
        return made

    def _bad(self, task: Task, error: BadRecord, value: dict[str, Any]) -> None:
        if self.spec.on_error == "stop":
            raise UserError(f"{error}\nTo leave such records out and count them, write on_error: drop in the recipe.")
        row = {"_where": error.where, "_source": task.source, "record": value}
        self._drop(0, row, Dropped("unreadable", {"error": error.problem}))

    def apply(self, number: int, step: RowStep, rows: list[Row]) -> list[Row]:
        """The rows after one step."""
        results = step.apply(rows)
        kept: list[Row] = []
        for row, result in zip(rows, results, strict=True):
            tally = self.counts.tallies[number, row["_source"]]
            tally.rows_in += 1
            if isinstance(result, Dropped):
                self._drop(number, row, result)
                continue
            if isinstance(result, list):
                tally.added += len(result) - 1
                tally.rows_out += len(result)
                kept += [{**made, "id": row_id(made)} for made in result]
                continue
            tally.rows_out += 1
            if result is not row:
                tally.changed += 1
                result = {**result, "id": row_id(result)}
            kept.append(result)
        return kept

    def judge(self, rows: list[Row], start: int) -> list[Row]:
        """The rows after the verdicts that were given on them."""
        part = slice(start, start + len(rows))
        left: list[tuple[int, Row]] = list(enumerate(rows))
        for number, folder in self.spec.verdicts:
            verdict = StoredVerdict(folder, part)
            kept = []
            for at, row in left:
                tally = self.counts.tallies[number, row["_source"]]
                tally.rows_in += 1
                if verdict.code[at] >= 0:
                    detail = verdict.detail(at)
                    self._drop(number, row, Dropped(verdict.reasons[verdict.code[at]], detail))
                    continue
                given = {**row, **verdict.fields(at)} if verdict.columns else row
                if given.pop(ID_TAKEN, False):
                    given["id"] = content_digest(given).hex()[:16]
                times = verdict.times(at)
                tally.added += times - 1
                tally.rows_out += times
                kept.append((at, given))
                kept += [(at, {**given, "id": f"{given['id']}-{copy}"}) for copy in range(2, times + 1)]
            left = kept
        return [row for _, row in left]

    def _drop(self, step: int, row: Row, why: Dropped) -> None:
        text = json.dumps(_public(row), ensure_ascii=False, default=str)
        example = {"where": row["_where"], "id": row.get("id", ""), "text": text[:EXCERPT], "detail": why.detail}
        self.counts.drop(step, row["_source"], why.reason, example)
        self.dropped.append(
            {
                "where": row["_where"],
                "source": self.spec.sources[row["_source"]],
                "step": f"{step} {self.spec.steps[step]}",
                "reason": why.reason,
                "detail": json.dumps(why.detail, ensure_ascii=False, sort_keys=True),
                "row": text,
            }
        )


def _public(row: Row) -> Row:
    return {name: value for name, value in row.items() if not name.startswith("_")}


def write_shard(
    folder: Path, shard: int, rows: Sequence[Row], passage: _Passage, sketches: dict[str, np.ndarray]
) -> None:
    """Rows, dropped rows and sketches, then the counts, which say that the others are whole."""
    with passage.timed(STORAGE):
        write_rows(folder / f"{shard:05d}.parquet", list(rows))
        pq.write_table(pa.Table.from_pylist(passage.dropped, DROPPED), folder / f"{shard:05d}.dropped.parquet")
        np.savez(folder / f"{shard:05d}.npz", **sketches)  # type: ignore[arg-type]
    digests = {end: file_digest(folder / f"{shard:05d}{end}") for end in FILES}
    found = {"rows": len(rows), "seconds": passage.seconds, "digests": digests, **passage.counts.to_json()}
    write_sealed(folder / f"{shard:05d}.json", found)


FILES = (".parquet", ".dropped.parquet", ".npz")
"""Ends of the names of a shard's files, beside the one that says that it is finished."""


def read_shard(folder: Path, shard: int) -> list[Row]:
    """A shard's rows, without the fields that are empty in them."""
    rows = read_rows(folder / f"{shard:05d}.parquet")
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


@dataclass(frozen=True)
class Finished:
    """What is known of a finished shard."""

    rows: int
    counts: Counts
    seconds: dict[int, float]
    digests: dict[str, str]
    """Of its files, by how their names end."""


def finished(folder: Path, shard: int) -> Finished | None:
    """What a shard's last file says; None for one that is not finished, or where that file is damaged."""
    try:
        found = parse_sealed((folder / f"{shard:05d}.json").read_bytes())
    except (FileNotFoundError, DamagedFile):
        return None
    seconds = {int(step): value for step, value in found["seconds"].items()}
    return Finished(found["rows"], Counts.from_json(found), seconds, found["digests"])


def is_whole(folder: Path, shard: int) -> bool:
    """Whether a shard is finished and its files are as they were written; one that is not is made again."""
    known = finished(folder, shard)
    try:
        return known is not None and all(
            file_digest(folder / f"{shard:05d}{end}") == digest for end, digest in known.digests.items()
        )
    except FileNotFoundError:
        return False


def read_sketches(folder: Path, shards: int) -> dict[str, np.ndarray]:
    """Each named array over all rows, one column at a time so that little is held twice."""
    files = [np.load(folder / f"{shard:05d}.npz", allow_pickle=False) for shard in range(shards)]
    try:
        return {name: np.concatenate([file[name] for file in files]) for name in files[0].files} if files else {}
    finally:
        for file in files:
            file.close()
