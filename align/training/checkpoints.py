"""Find the checkpoint that a killed stage resumes from, and store a stage's state in sealed files.

transformers writes a checkpoint file by file, so a kill can leave an incomplete checkpoint that looks complete. A disk
can also corrupt a file. A checkpoint is valid only if its marker exists and every file still has the digest that the
marker lists. The marker is written last. The trainer's ``save_total_limit`` keeps only the newest two.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.models.compute.processes import wait_for_all
from align.pipeline.process_limits import usable_cores
from align.store.json_files import DamagedFile, parse_sealed, read_file, sync_folder, write_atomically, write_sealed

MARKER = "complete.json"
DAMAGED = "damaged"
"""Folder for damaged checkpoints, next to the valid ones."""
BLOCK_BYTES = 64 * 2**20
READ_BYTES = 4 * 2**20
"""Size of a block and of a read. Each block has its own digest, so threads can share a file."""
READERS = min(8, usable_cores())
"""Threads; each computes 2 GB of SHA-256 a second with the processor's own instructions."""

LOG = logging.getLogger(__name__)

Warn = Callable[[str], object]


def mark_complete(folder: Path) -> None:
    """Sync every file of ``folder`` to the disk, then write the marker with their digests atomically."""
    names = _list_files(folder)
    # Files first, marker last: a marker promises that every byte of the checkpoint is on the disk.
    for name in names:
        _sync(folder / name)
    write_atomically(folder / MARKER, {"sha256": _hash_files(folder, names)})
    sync_folder(folder)


def find_damage(folder: Path) -> str | None:
    """Return why a marked checkpoint is damaged, as the end of a sentence; None for an intact checkpoint."""
    try:
        listed = _read_marker(folder)
        missing = sorted(listed.keys() - set(_list_files(folder)))
        if missing:
            return f"its file {missing[0]} is missing"
        digests = _hash_files(folder, listed)
    except (OSError, ValueError) as error:
        return f"its {MARKER} or a file in it cannot be read ({error})"
    changed = sorted(name for name, digest in listed.items() if digests[name] != digest)
    return f"its file {changed[0]} is not as it was written (by the SHA-256 in {MARKER})" if changed else None


def is_complete(folder: Path) -> bool:
    """Return True when the marker exists and every file in it has its digest."""
    return find_damage(folder) is None


def last_complete(
    checkpoints: Path, warn: Warn = LOG.warning, unmarked: Literal["remove", "leave"] = "remove"
) -> Path | None:
    """Return the newest complete ``checkpoint-<step>`` folder, or None.

    A folder without a marker is left from a kill and is removed; with ``unmarked="leave"`` it may be another program's
    and stays. A damaged checkpoint is moved to ``damaged/``, and ``warn`` is called with the checkpoint that training
    resumes from instead. Checkpoints older than the result are not read.
    """
    warnings = []
    newest = None
    # From the newest to the oldest: the first intact checkpoint is the result, and damaged checkpoints before it are
    # set aside.
    for folder in sorted(_list_checkpoints(checkpoints), key=_step, reverse=True):
        if not (folder / MARKER).is_file():
            if unmarked == "leave":
                continue
            LOG.warning("removed %s: a kill cut it short", folder)
            shutil.rmtree(folder)
            continue
        reason = None if newest is not None else find_damage(folder)
        if reason is not None:
            warnings.append(f"{folder.name} is damaged: {reason}. It was moved to {_set_aside(folder)}.")
        elif newest is None:
            newest = folder
    for warning in warnings:
        warn(f"{warning} Training resumes from {'its start' if newest is None else newest.name}.")
    return newest


class MarkCheckpoints(TrainerCallback):
    """Marks each checkpoint once all processes have written their files."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wait_for_all()
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def link(file: Path, target: Path) -> None:
    """Hard-link ``file`` to ``target``, or copy it if the file system has no hard links; replaces ``target``."""
    if target.exists() and target.samefile(file):
        return  # renaming one link of a file to another has no effect and would leave the draft
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        # A hard link costs no space; both names keep the content if one is deleted.
        draft.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, draft)
    draft.replace(target)


def _read_marker(folder: Path) -> dict[str, list[str]]:
    """Read the digests of each file's blocks from the marker. Raises ``ValueError`` for a malformed marker."""
    try:
        digests = json.loads((folder / MARKER).read_text(encoding="utf-8"))["sha256"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(digests, dict) or not digests:
        raise ValueError("no file has a digest there")
    return digests


def _list_checkpoints(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _set_aside(folder: Path) -> Path:
    """Move a damaged checkpoint to ``damaged/`` and return its new path."""
    target = folder.parent / DAMAGED / folder.name
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    return target


def _list_files(folder: Path) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / MARKER]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _hash_files(folder: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the SHA-256 of each file's blocks, computed in several threads."""
    # An empty file has one empty block, so it has a digest as well.
    blocks = [
        (name, start) for name in names for start in range(0, max(1, (folder / name).stat().st_size), BLOCK_BYTES)
    ]
    # ``map`` keeps the order of the blocks, so a file's digests are in the order of its content.
    digests: dict[str, list[str]] = {}
    # hashlib releases the interpreter lock for large blocks, so threads run in parallel.
    with ThreadPoolExecutor(READERS) as readers:
        hashes = readers.map(lambda block: _hash_block(folder, *block), blocks)
        for (name, _), digest in zip(blocks, hashes, strict=True):
            digests.setdefault(name, []).append(digest)
    return digests


def _hash_block(folder: Path, name: str, start: int) -> str:
    digest = hashlib.sha256()
    remaining = BLOCK_BYTES
    with (folder / name).open("rb", buffering=0) as file:
        file.seek(start)
        while remaining and (content := file.read(min(remaining, READ_BYTES))):
            digest.update(content)
            remaining -= len(content)
    return digest.hexdigest()


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def write_state(file: Path, content: dict[str, Any]) -> None:
    """Write ``content``, which JSON must be able to hold, with a seal and sync it to the disk."""
    write_sealed(file, content)


def read_state(file: Path) -> dict[str, Any] | None:
    """Return the content of a sealed ``file``; None, with a log message, if it is missing or damaged."""
    try:
        return parse_sealed(read_file(file))
    except FileNotFoundError:
        return None
    except (OSError, DamagedFile) as error:
        LOG.warning("%s %s; its content is computed again", file, error)
        return None
