"""``align list``, ``show`` and ``gc``: the artifacts of a store. Imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.console import printable
from align.cli.parser import print_json, printable_json
from align.errors import NO_SPACE, UserError

if TYPE_CHECKING:
    from align.store.store import Store


def say_damage(errors: Iterable[Exception]) -> None:
    """A line on standard error for each damaged file, which harms only its own artifact or run."""
    for error in errors:
        print(printable(f"! {error}"), file=sys.stderr)


def list_artifacts(options: argparse.Namespace) -> int:
    """list the artifacts in the store and the runs that reach them"""
    from align.runner.open_store import open_store

    store = open_store(None, options.store)
    runs, damaged_runs = store.survey_runs()
    users: dict[str, list[str]] = {}
    for name, run in runs.items():
        for entry in run["stages"].values():
            users.setdefault(entry["key"], []).append(name)
    artifacts, damaged = store.survey()
    here = {artifact.record["key"]: artifact.record for artifact in artifacts}
    remote, damaged_there = store.remote.survey() if store.remote is not None else ([], [])
    there = {record["key"]: record for record in remote}
    records = sorted({**there, **here}.values(), key=lambda record: str(record["created"]))

    def where(key: str) -> str:
        return "bucket" if key not in here else "both" if key in there else "here"

    say_damage([*damaged_runs, *damaged, *damaged_there])
    if options.json:
        names = ("kind", "key", "stage", "created", "seconds", "metrics")
        print_json([{**{name: r.get(name) for name in names}, "where": where(r["key"])} for r in records])
        return 0
    if not records and not damaged:
        print(printable(f"{store.root}: empty"))
    for record in records:
        size = sum(entry["bytes"] for entry in record["outputs"].values()) / 2**20
        reaching = ", ".join(users.get(record["key"], [])) or "no run"
        name = f"{record['kind']}/{record['key'][:12]}"
        place = f"  {where(record['key']):<6}" if store.remote is not None else ""
        print(printable(f"{name}  {record['created'][:16]}  {size:8.1f} MiB{place}  {record['makes']}  {reaching}"))
    return 0


def show(options: argparse.Namespace) -> int:
    """show one artifact's record; --log prints its log, --verify checks every digest"""
    from align.runner.open_store import open_store

    store = open_store(None, options.store)
    artifact = store.resolve(options.key)
    if options.verify:
        problems = store.problems(artifact, thorough=True)
        for problem in problems:
            print(printable(f"{problem.path} {problem.what}"))
        print(printable(f"{artifact.path}: {'corrupted' if problems else 'every digest agrees'}"))
        return 1 if problems else 0
    if options.log:
        return _print_log(artifact.path / "log.txt")
    if options.json:
        print_json(artifact.record)
        return 0
    record = {name: value for name, value in artifact.record.items() if name not in ("outputs", "parts")}
    print(printable(str(artifact.path)))
    print(printable_json(record))
    for name, entry in artifact.record["outputs"].items():
        print(printable(f"  {entry['bytes']:>12}  {entry['sha256'][:12]}  {name}"))
    return 0


def _print_log(path: Path) -> int:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: the log cannot be read ({error.strerror}).") from None
    print("\n".join(printable(line) for line in text.splitlines()))
    return 0


def collect_garbage(options: argparse.Namespace) -> int:
    """list what no named run reaches any more; --delete deletes it"""
    from align.clusters.slurm.used import used_by_jobs
    from align.runner.open_store import open_store

    store = open_store(None, options.store)
    folders = store.garbage(used_by_jobs(store))
    sizes = {folder: _size(folder) for folder in folders}
    outcomes: dict[Path, bool] = {}
    if options.delete and folders:
        _say_wait(store)
        try:
            outcomes = store.delete_garbage(lambda: used_by_jobs(store))
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise UserError(
                f"no space left on the disk that holds {store.root}, not even for gc's own lock of 1 KiB. Delete "
                f"{store.cache}, which only saves time, and run again."
            ) from None
        folders = list(outcomes)
    if options.json:
        print_json([
            {"path": str(folder), "bytes": sizes.get(folder, 0), "deleted": outcomes.get(folder, False)}
            for folder in folders
        ])  # fmt: skip
        return 0
    _say_users(store)
    for folder in folders:
        state = "deleted" if outcomes.get(folder) else "in use" if options.delete else "unreached"
        print(printable(f"{state}  {sizes.get(folder, 0) / 2**20:8.1f} MiB  {folder}"))
    total = sum(sizes.get(folder, 0) for folder in folders) / 2**20
    tail = "" if options.delete or not folders else "; `align gc --delete` deletes them"
    print(f"{len(folders)} folders, {total:.1f} MiB that no named run reaches{tail}")
    return 0


def _say_wait(store: Store) -> None:
    """Say what may take a while: whether a run on another machine lives shows within its lease."""
    names = sorted({uses.run for uses in store.uses()})
    if names:
        text = (
            f"looking whether these runs are still under way, for up to {store.lease.seconds:g} s: {', '.join(names)}"
        )
        print(printable(text), file=sys.stderr)


def _say_users(store: Store) -> None:
    """The runs under way, whose stages are kept."""
    names = sorted({uses.run for uses in store.uses()})
    if names:
        print(printable(f"kept for runs that are under way: {', '.join(names)}"))


def _size(folder: Path) -> int:
    """Bytes in a folder, which may be deleted or moved meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def add_arguments(list_parser: Any, show_parser: Any, gc_parser: Any) -> None:
    """The options of the three commands."""
    from align.cli.parser import add_store

    for parser in (list_parser, show_parser, gc_parser):
        add_store(parser)
    show_parser.add_argument("key", metavar="KEY", help="the beginning of an artifact's key")
    show_parser.add_argument("--log", action="store_true", help="print the stage's log")
    show_parser.add_argument("--verify", action="store_true", help="check every file's digest")
    gc_parser.add_argument("--delete", action="store_true", help="delete what is listed")
