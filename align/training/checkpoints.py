"""Which checkpoint a killed stage may resume from.

transformers writes a checkpoint file by file, so a kill can leave one that looks whole and is not, and a disk can give
back other bytes than it was given. A checkpoint counts only when its marker, written last, lists every file and the
files still have the digests that stand there. Leaves out keeping the newest two: the trainer's ``save_total_limit``
does that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.models.processes import wait_for_all
from align.store.atomic_write import sync_folder, write_atomically

MARKER = "complete.json"
DAMAGED = "damaged"
"""Folder beside the checkpoints for those whose files changed after they were written."""
BLOCK_BYTES, READ_BYTES = 64 * 2**20, 4 * 2**20
"""A large file has a digest for every block, so that several threads can share it."""
READERS = min(8, os.cpu_count() or 1)
"""Blocks read at once; a thread makes 2 GB of SHA-256 a second with the processor's own instructions."""

Say = Callable[[str], object]


def mark_complete(folder: Path) -> None:
    """Bring every file of ``folder`` to the disk, then write the marker with their digests in one rename."""
    names = _list_files(folder)
    for name in names:
        _sync(folder / name)
    write_atomically(folder / MARKER, {"sha256": _hash_files(folder, names)})
    sync_folder(folder)


def find_damage(folder: Path) -> str | None:
    """Say why a marked checkpoint is not as it was written, as the end of a sentence; None where it is."""
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
    """True when the marker is there and every file that it lists has its digest."""
    return find_damage(folder) is None


def last_complete(checkpoints: Path, warn: Say = print, unmarked: Literal["remove", "leave"] = "remove") -> Path | None:
    """The newest complete ``checkpoint-<step>`` folder, or None.

    One without a marker was cut short by a kill and is removed, unless the caller says that none is ever cut short: it
    is another program's then. A damaged one is moved to ``damaged/``, and ``warn`` is told where training resumes
    instead. Checkpoints older than the one returned are not read.
    """
    warnings = []
    newest = None
    for folder in sorted(_list_checkpoints(checkpoints), key=_step, reverse=True):
        if not (folder / MARKER).is_file():
            if unmarked == "leave":
                continue
            print(f"removed {folder}: a kill cut it short")
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
    """Give ``file`` a second name, or copy it where the file system has no hard links; replaces ``target``."""
    if target.exists() and target.samefile(file):
        return  # to rename one name of a file to another of its names does nothing, and the draft would stay
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        draft.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, draft)
    draft.replace(target)


def _read_marker(folder: Path) -> dict[str, list[str]]:
    """File -> digests of its blocks, as the marker has them; ``ValueError`` where it holds something else."""
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
    """Move a damaged checkpoint out of the way; returns where it is now."""
    target = folder.parent / DAMAGED / folder.name
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    return target


def _list_files(folder: Path) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / MARKER]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _hash_files(folder: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """SHA-256 of each file's blocks, of which several are read at once."""
    blocks = [
        (name, start) for name in names for start in range(0, max(1, (folder / name).stat().st_size), BLOCK_BYTES)
    ]
    digests: dict[str, list[str]] = {}
    with ThreadPoolExecutor(READERS) as readers:
        hashes = readers.map(lambda block: _hash_block(folder, *block), blocks)
        for (name, _), digest in zip(blocks, hashes, strict=True):
            digests.setdefault(name, []).append(digest)
    return digests


def _hash_block(folder: Path, name: str, start: int) -> str:
    digest, left = hashlib.sha256(), BLOCK_BYTES
    with (folder / name).open("rb", buffering=0) as file:
        file.seek(start)
        while left and (content := file.read(min(left, READ_BYTES))):
            digest.update(content)
            left -= len(content)
    return digest.hexdigest()


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
