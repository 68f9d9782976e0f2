"""Damages every file of a finished store, one at a time, and says how the commands of ``align`` take it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from align.cli.main import main

Damage = Callable[[bytes], bytes | None]


def flip_bit(content: bytes) -> bytes:
    """One bit in the middle; of a blank the lowest, which makes it another sign."""
    changed = bytearray(content)
    if changed:
        changed[len(changed) // 2] ^= 1
    return bytes(changed)


def flip_last_bit(path: Path) -> None:
    """Flip a bit of a file's last byte as a disk does it: size and time stay."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGES: dict[str, Damage] = {
    "truncated": lambda content: content[: len(content) // 2],
    "bit": flip_bit,
    "empty": lambda content: b"",
    "list": lambda content: b"[]",
    "object": lambda content: b"{}",
    "deleted": lambda content: None,
}
NO_RESULT = ("log.txt", "events.jsonl")
"""Files that tell how a stage went; ``docs/store.md`` says that they are no part of its result."""


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it printed, the store's own path left out."""

    code: int
    out: str
    err: str


def files_of(store: Path) -> list[str]:
    """Every file of a store but caches, which check themselves, relative to it."""
    names = (path.relative_to(store).as_posix() for path in sorted(store.rglob("*")) if path.is_file())
    return [name for name in names if not name.startswith("cache/")]


@contextlib.contextmanager
def damaged(path: Path, damage: Damage) -> Iterator[None]:
    """Damage a file while the block runs. Its size and time then come back with its content."""
    content, stat = path.read_bytes(), path.stat()
    changed = damage(content)
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def ask(command: Sequence[str], store: Path, capsys: pytest.CaptureFixture[str]) -> Answer:
    """Run a command in this process; an error that no command should end with is raised."""
    capsys.readouterr()
    code = main([*command, "--store", str(store)])
    captured = capsys.readouterr()
    return Answer(code, captured.out.replace(str(store), "STORE"), captured.err.replace(str(store), "STORE"))


def unnamed_damages(
    store: Path,
    names: Sequence[str],
    commands_for: Callable[[str, str], Sequence[Sequence[str]]],
    capsys: pytest.CaptureFixture[str],
) -> list[str]:
    """Damages after which a command of ``commands_for(file, damage)`` neither names the file nor answers as before."""
    commands = {tuple(command) for name in names for command in commands_for(name, "bit")}
    full = {command: ask(command, store, capsys) for command in sorted(commands)}
    unnamed = []
    for name in names:
        for kind, damage in DAMAGES.items():
            with damaged(store / name, damage):
                answers = {tuple(command): ask(command, store, capsys) for command in commands_for(name, kind)}
            for command, answer in answers.items():
                is_named = name.rpartition("/")[2] in answer.out + answer.err
                if answer != full[command] and not is_named and is_part_of_a_result(name, kind):
                    unnamed.append(f"{name} {kind}: {' '.join(command)}: {answer}")
    return unnamed


def is_part_of_a_result(name: str, damage: str) -> bool:
    """Whether a damage to this file must be named or change nothing; ``docs/store.md`` lists what is exempt."""
    file = name.rpartition("/")[2]
    if file in NO_RESULT or name.startswith(("reports/", "locks/")):
        return False
    # without its record a stage was never finished, and without its file a run was never made
    return damage != "deleted" or not (file == "record.json" or name.startswith("runs/"))
