"""Verdicts of table steps on disk: written once, and read a shard at a time by the next pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align.data.steps.base import Verdict
from align.errors import UserError
from align.store.fingerprint import file_digest
from align.store.json_files import DamagedFile, parse_sealed, write_sealed


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
        # Parquet filters row groups, so that a worker decodes only the details of its own shard.
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
