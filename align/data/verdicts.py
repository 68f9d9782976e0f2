"""Verdicts on disk: what a step over all rows decided, written once and read a shard at a time by the next pass."""

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

    ``stand_ins`` has, for each row that ``instead`` points to in the order of ``np.unique``, what is said of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "code.npy", verdict.code)
    if verdict.times is not None:
        np.save(folder / "times.npy", verdict.times)
    for name, column in verdict.columns.items():
        np.save(folder / f"column-{name}.npy", column)
    if stand_ins is not None and verdict.instead is not None:
        places = np.unique(verdict.instead[verdict.instead >= 0])
        np.save(folder / "instead.npy", np.where(verdict.instead >= 0, np.searchsorted(places, verdict.instead), -1))
        pq.write_table(pa.Table.from_pylist(stand_ins), folder / "stand_ins.parquet")
    if verdict.details:
        places, details = zip(*sorted(verdict.details.items()), strict=True)
        said = [json.dumps(detail, ensure_ascii=False) for detail in details]
        pq.write_table(pa.table({"row": pa.array(places, pa.int64()), "detail": said}), folder / "details.parquet")
    digests = {path.name: file_digest(path) for path in sorted(folder.glob("*.npy")) + sorted(folder.glob("*.parquet"))}
    summary = {
        "reasons": verdict.reasons, "columns": sorted(verdict.columns), "notes": verdict.notes, "digests": digests,
    }  # fmt: skip
    write_sealed(folder / "verdict.json", summary)


def is_stored(folder: Path) -> bool:
    """Whether a whole verdict lies in ``folder``; one that is damaged is decided again."""
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
        raise UserError(f"{path}: damaged: it {error}. Run again to decide on these rows anew.") from None


class StoredVerdict:
    """A verdict on some of the rows, read from its folder."""

    def __init__(self, folder: Path, part: slice) -> None:
        said = _read_summary(folder)
        self.reasons: list[str] = said["reasons"]
        self.notes: dict[str, Any] = said["notes"]
        self.code = self._load(folder / "code.npy", part)
        self.columns = {name: self._load(folder / f"column-{name}.npy", part) for name in said["columns"]}
        self._times = self._load(folder / "times.npy", part) if (folder / "times.npy").exists() else None
        self._instead = self._load(folder / "instead.npy", part) if (folder / "instead.npy").exists() else None
        self._stand_ins = pq.read_table(folder / "stand_ins.parquet") if self._instead is not None else None
        self._details = self._read_details(folder / "details.parquet", part)

    @staticmethod
    def _load(path: Path, part: slice) -> np.ndarray:
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[part])

    @staticmethod
    def _read_details(path: Path, part: slice) -> dict[int, dict[str, Any]]:
        if not path.exists():
            return {}
        inside = (pc.field("row") >= part.start) & (pc.field("row") < part.stop)
        found = pq.read_table(path, filters=inside).to_pylist()
        return {line["row"] - part.start: json.loads(line["detail"]) for line in found}

    def times(self, at: int) -> int:
        """How often a row appears."""
        return 1 if self._times is None else int(self._times[at])

    def fields(self, at: int) -> dict[str, Any]:
        """What a kept row is given."""
        return {name: column[at].item() for name, column in self.columns.items()}

    def detail(self, at: int) -> dict[str, Any]:
        """What is particular to a dropped row; under ``instead``, which row stands for it."""
        found = self._details.get(at, {})
        if self._instead is None or self._stand_ins is None or self._instead[at] < 0:
            return found
        return {**found, "instead": self._stand_ins.slice(int(self._instead[at]), 1).to_pylist()[0]}
