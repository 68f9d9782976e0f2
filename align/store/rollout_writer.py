"""The writer of stored rollouts, which a resumed run continues, and the files of a finished stage. Torch-free.

An update is a new file. The last ``MERGED_FILES`` files of one level are merged into a new file of the next level, so a
long run has few files, and each row is written a few times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align.errors import UserError
from align.store.json_files import Warn, write_bytes_atomically, write_sealed
from align.store.rollouts import (
    FORMAT,
    FORMAT_KEY,
    NUMBERS,
    ROLLOUTS,
    SCHEMA,
    SETTINGS_KEY,
    TOKEN_COLUMNS,
    VALIDATIONS,
    RolloutFile,
    check_file,
    file_settings,
    manifest_path,
    read_manifest,
    updates_of,
)

MERGED_FILES, MERGED_BYTES = 8, 32 * 2**20
"""Files of one level that are merged while the stage runs, and the most bytes of the result."""
GROUP_BYTES, FINISHED_BYTES = 16 * 2**20, 128 * 2**20
"""Bytes in memory of a row group, and bytes of a finished stage's file."""
GRACE_SECONDS = 300.0
"""Seconds that a file stays after the manifest lists it no longer."""
_SPLIT_COLUMNS = [f"{name}.list.element" for name, kind in TOKEN_COLUMNS.items() if kind == NUMBERS]
_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    # Numbers by token hardly ever repeat, but their bytes of equal weight do.
    "use_dictionary": [name for name in SCHEMA.names if f"{name}.list.element" not in _SPLIT_COLUMNS],
    "use_byte_stream_split": _SPLIT_COLUMNS,
}


@dataclass
class RolloutFiles:
    """Writes the rollouts of a run into ``root/rollouts`` and ``root/validations``, up to ``max_bytes`` in all."""

    root: Path
    max_bytes: int
    settings: Mapping[str, Any]
    """Settings of the run, which every file stores."""
    notify: Warn
    _files: dict[str, list[RolloutFile]] = field(default_factory=dict, repr=False)
    """Files that the manifest of each folder lists."""
    _unlisted: dict[Path, float] = field(default_factory=dict, repr=False)
    """Other files, and the time since which no manifest lists them."""
    _has_notified: bool = field(default=False, repr=False)

    def rewind(self, updates: int) -> None:
        """Drop the rows that a run after ``updates`` finished updates writes again."""
        self._files.clear()
        # The validation after an update is repeated by a run that resumes there.
        for name, last in ((ROLLOUTS, updates), (VALIDATIONS, updates - 1)):
            folder = self.root / name
            files = []
            for file in resume_manifest(folder, self.notify):
                first_update, last_update = updates_of(file.name) or (0, 0)
                if last_update <= last:
                    files.append(file)
                elif first_update <= last:
                    tables = read_tables(folder, [file])
                    earlier_rows = (table.filter(pc.less_equal(table["update"], last)) for table in tables)
                    files.append(write_file(folder, earlier_rows, self.settings, level=file.level))
            self._files[name] = files
            if folder.is_dir():
                self._save(name)

    def write(self, table: pa.Table, name: str = ROLLOUTS) -> None:
        """Add the rows of one update, with the columns of ``SCHEMA``, to the folder ``name``."""
        if not len(table):
            return
        folder = self.root / name
        if name not in self._files:
            self._files[name] = resume_manifest(folder, self.notify)
        files = self._files[name]
        if files and not {file.name for file in files} <= set(os.listdir(folder)):
            files = intact_files(folder, files, self.notify)
        files = [*files, write_file(folder, [table], self.settings)]
        while self._can_merge(tail := files[-MERGED_FILES:]):
            tables = read_tables(folder, intact_files(folder, tail, self.notify))
            files[-MERGED_FILES:] = [write_file(folder, tables, self.settings, level=tail[0].level + 1)]
        self._files[name] = files
        for changed in {name, *self._limit_size(files[-1])}:
            self._save(changed)

    def _can_merge(self, tail: Sequence[RolloutFile]) -> bool:
        # A merged file is dropped as a whole, so it is also a small part of the limit.
        largest = min(MERGED_BYTES, self.max_bytes // MERGED_FILES)
        is_level_full = len(tail) == MERGED_FILES and len({file.level for file in tail}) == 1
        return is_level_full and sum(file.bytes for file in tail) <= largest

    def _limit_size(self, written: RolloutFile) -> set[str]:
        """Drop the files of the oldest updates until the size is below the limit; return the folders that changed."""
        listed = [(updates_of(file.name) or (0, 0), name, file) for name in self._files for file in self._files[name]]
        total = sum(file.bytes for *_, file in listed)
        changed = set()
        for _, name, file in sorted(listed, key=lambda entry: entry[0]):
            if total <= self.max_bytes:
                break
            if file is written:
                continue
            total -= file.bytes
            self._files[name].remove(file)
            changed.add(name)
        if changed and not self._has_notified:
            self._has_notified = True
            self.notify(
                f"the rollouts exceed rollouts.max_gb {self.max_bytes / 10**9:g}; those of the oldest updates are "
                "deleted"
            )
        return changed

    def _save(self, name: str) -> None:
        """Write a manifest, and delete the files that no reader of an earlier manifest can still be reading."""
        folder = self.root / name
        write_manifest(folder, self._files[name])
        listed = {file.name for file in self._files[name]}
        now = time.monotonic()
        for path in folder.glob("*.parquet"):
            if path.name in listed:
                self._unlisted.pop(path, None)
            elif now - self._unlisted.setdefault(path, now) >= GRACE_SECONDS:
                # Somebody may have put a folder there.
                with contextlib.suppress(OSError):
                    path.unlink()


def write_file(
    folder: Path, tables: Iterable[pa.Table], settings: Mapping[str, Any], *, prefix: str = "", level: int = 0
) -> RolloutFile:
    """Write tables of ``SCHEMA`` as a new file with the settings of its run.

    ``prefix`` begins its name; by default the first and the last update do.
    """
    schema = SCHEMA.with_metadata({FORMAT_KEY: FORMAT, SETTINGS_KEY: json.dumps(settings, default=str)})
    sink = pa.BufferOutputStream()
    updates: list[int] = []
    with pq.ParquetWriter(sink, schema, **_OPTIONS) as writer:
        for group in _row_groups(tables):
            writer.write_table(group.replace_schema_metadata(schema.metadata), row_group_size=max(1, len(group)))
            if not prefix:
                updates += pc.min_max(group["update"]).as_py().values()
    content = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(content).hexdigest()
    prefix = prefix or f"{min(updates, default=0):06d}-{max(updates, default=0):06d}"
    file = RolloutFile(name=f"{prefix}-{digest[:8]}.parquet", bytes=len(content), sha256=digest, level=level)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(folder / file.name, content)
    return file


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the tables joined to row groups of about ``GROUP_BYTES``."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(part.nbytes for part in group) >= GROUP_BYTES:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)


def merge(source: Path, target: Path, notify: Warn) -> None:
    """Write the rows of a running stage's folder, if there are any, as few large files into ``target``.

    The folder ``target`` is written anew.
    """
    shutil.rmtree(target, ignore_errors=True)
    files = resume_manifest(source, notify)
    settings = file_settings(source / files[0].name) if files else {}
    batch: list[RolloutFile] = []
    for number, file in enumerate(files, start=1):
        batch.append(file)
        if number == len(files) or sum(part.bytes for part in batch) >= FINISHED_BYTES:
            # The tables become row groups one after the other, so at most one file is in memory.
            write_file(target, read_tables(source, batch), settings)
            batch = []


def read_tables(folder: Path, files: Iterable[RolloutFile]) -> Iterator[pa.Table]:
    """Yield the rows of each file."""
    for file in files:
        yield pq.read_table(folder / file.name, schema=SCHEMA)


# ---- manifests ----


def write_manifest(folder: Path, files: Sequence[RolloutFile]) -> None:
    """Replace the manifest of a folder."""
    write_sealed(manifest_path(folder), {"files": [file.model_dump() for file in files]})


def resume_manifest(folder: Path, notify: Warn) -> list[RolloutFile]:
    """Return the files that a resumed stage continues."""
    try:
        listed = read_manifest(folder)
        if listed is None and any(folder.glob("*.parquet")):
            notify(f"{folder}: no {manifest_path(folder).name} lists its files. Their rollouts are dropped.")
        return intact_files(folder, listed or [], notify)
    except UserError as error:
        notify(f"{error} The rollouts of earlier updates are dropped.")
        return []


def intact_files(folder: Path, files: Iterable[RolloutFile], notify: Warn) -> list[RolloutFile]:
    """Return the files that are as the manifest lists them; the rows of others are dropped with a warning."""
    intact = []
    for file in files:
        try:
            check_file(folder / file.name, file.bytes, file.sha256, manifest_path(folder))
        except UserError as error:
            notify(f"{error} Its rollouts are dropped.")
        else:
            intact.append(file)
    return intact
