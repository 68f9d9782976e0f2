"""Damages every file of a finished store, one at a time, and says how the commands of ``align`` take it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from align.cli import main

Damage = Callable[[bytes], bytes | None]


def flip_bit(content: bytes) -> bytes:
    """One bit in the middle; of a blank the lowest, which makes it another sign."""
    changed = bytearray(content)
    if changed:
        changed[len(changed) // 2] ^= 1
    return bytes(changed)


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


def copy_damaged(store: Path, copy: Path, name: str, damage: Damage) -> None:
    """Copy ``store``, large files as links, with the file ``name`` damaged."""

    def take(source: str, target: str) -> None:
        if os.path.getsize(source) > 1 << 16:
            os.link(source, target)  # only read; what is written in place is small
        else:
            shutil.copy2(source, target)

    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy, copy_function=take)
    content = damage((store / name).read_bytes())
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)


def ask(command: Sequence[str], store: Path, capsys: pytest.CaptureFixture[str]) -> Answer:
    """Run a command in this process; an error that no command should end with is raised."""
    capsys.readouterr()
    code = main([*command, "--store", str(store)])
    said = capsys.readouterr()
    return Answer(code, said.out.replace(str(store), "STORE"), said.err.replace(str(store), "STORE"))


def takes(
    store: Path, copy: Path, commands: Sequence[Sequence[str]], names: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[str, str, list[str], Answer, Answer]]:
    """Every (file, damage, command, its answer, the answer of the whole store), where the two differ."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy)
    whole = {tuple(command): ask(command, copy, capsys) for command in commands}
    for name in names:
        for kind, damage in DAMAGES.items():
            copy_damaged(store, copy, name, damage)
            for command in commands:
                answer = ask(command, copy, capsys)
                if answer != whole[tuple(command)]:
                    yield name, kind, list(command), answer, whole[tuple(command)]
