"""``align list``, ``show``, ``gc`` and ``push``: the artifacts of a store. Has no heavy imports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from align.cli.parser import Handler, add_store, print_json, printable_json
from align.errors import NO_SPACE, UserError, printable
from align.store.record import DamagedArtifact

if TYPE_CHECKING:
    from align.store.artifacts import Artifact
    from align.store.remote import Remote
    from align.store.store import Store

MIB = 2**20


def print_damage(errors: Iterable[Exception]) -> None:
    """Print a line on standard error for each damaged file; it harms only its own artifact or run."""
    for error in errors:
        print(printable(f"! {error}"), file=sys.stderr)


def run_list(options: argparse.Namespace) -> int:
    """Run ``align list``."""
    from align.runner.open_store import open_store

    store = open_store(None, options.store)
    runs, damaged_runs = store.survey_runs()
    users: dict[str, list[str]] = {}
    for name, run in runs.items():
        for entry in run["stages"].values():
            users.setdefault(entry["key"], []).append(name)
    artifacts, damaged = store.survey()
    local = {artifact.record["key"]: artifact.record for artifact in artifacts}
    remote_records, damaged_remote = store.remote.survey() if store.remote is not None else ([], [])
    remote = {record["key"]: record for record in remote_records}
    # An artifact that is in both places is listed once, by its local record.
    records = sorted({**remote, **local}.values(), key=lambda record: str(record["created"]))

    def place(key: str) -> str:
        if key not in local:
            return "bucket"
        return "both" if key in remote else "here"

    print_damage([*damaged_runs, *damaged, *damaged_remote])
    if options.json:
        names = ("kind", "key", "stage", "created", "seconds", "metrics")
        print_json(
            [{**{name: record.get(name) for name in names}, "where": place(record["key"])} for record in records]
        )
        return 0
    if not records and not damaged:
        print(printable(f"{store.root}: empty"))
    for record in records:
        size = sum(entry["bytes"] for entry in record["outputs"].values()) / MIB
        reaching = ", ".join(users.get(record["key"], [])) or "no run"
        name = f"{record['kind']}/{record['key'][:12]}"
        where = f"  {place(record['key']):<6}" if store.remote is not None else ""
        print(printable(f"{name}  {record['created'][:16]}  {size:8.1f} MiB{where}  {record['makes']}  {reaching}"))
    return 0


def run_show(options: argparse.Namespace) -> int:
    """Run ``align show``."""
    from align.runner.open_store import open_store
    from align.store.record import find_extra_files

    store = open_store(None, options.store)
    artifact = store.resolve(options.key)
    if options.verify:
        problems = [*store.problems(artifact, thorough=True), *find_extra_files(artifact)]
        if options.json:
            described = [{"path": str(problem.path), "problem": problem.description} for problem in problems]
            print_json({"path": str(artifact.path), "problems": described})
            return 1 if problems else 0
        for problem in problems:
            print(printable(f"{problem.path} {problem.description}"))
        print(printable(f"{artifact.path}: {'corrupted' if problems else 'all digests agree'}"))
        return 1 if problems else 0
    if options.log and options.json:
        raise UserError("--log prints the log as it is; leave out --json.")
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


def run_gc(options: argparse.Namespace) -> int:
    """Run ``align gc``."""
    from align.clusters.slurm_submit import used_by_jobs
    from align.runner.open_store import open_store
    from align.store.garbage import DELETED, IN_USE, delete_garbage, find_garbage

    store = open_store(None, options.store)
    if options.delete:
        store.require_writable()
    folders = find_garbage(store, used_by_jobs(store))
    sizes = {folder: _size(folder) for folder in folders}
    # Without --delete no artifact is locked: the list may be out of date, and deleting checks again.
    outcomes: dict[Path, str] = {}
    if options.delete:
        runs = _active_runs(store)
        # Only after its lease is it known whether a run on another machine is alive.
        if runs:
            text = f"checking whether these runs are still active, for up to {store.lease.seconds:g} s: {runs}"
            print(printable(text), file=sys.stderr)
        try:
            outcomes = delete_garbage(store, lambda: used_by_jobs(store))
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise UserError(
                f"no space left on the disk of {store.root}, not even for gc's lock of 1 KiB. Delete "
                f"{store.cache}, which only saves time, and run again."
            ) from None
        folders = list(outcomes)
    failed = [folder for folder, state in outcomes.items() if state not in (DELETED, IN_USE)]
    if options.json:
        print_json(
            [
                {
                    "path": str(folder),
                    "bytes": sizes.get(folder, 0),
                    "deleted": outcomes.get(folder) == DELETED,
                    **({"error": outcomes[folder]} if folder in failed else {}),
                }
                for folder in folders
            ]
        )
        return 1 if failed else 0
    if runs := _active_runs(store):
        print(printable(f"kept for active runs: {runs}"))
    for folder in folders:
        state = outcomes.get(folder, "unused")
        print(printable(f"{state}  {sizes.get(folder, 0) / MIB:8.1f} MiB  {folder}"))
    total = sum(sizes.get(folder, 0) for folder in folders) / MIB
    remedy = "" if options.delete or not folders else "; `align gc --delete` deletes them"
    print(f"{len(folders)} folders, {total:.1f} MiB unused by any run{remedy}")
    if failed:
        print(f"! {len(failed)} folders could not be deleted; correct the cause and run again", file=sys.stderr)
    return 1 if failed else 0


def _active_runs(store: Store) -> str:
    """Return the names of the runs that use the store now."""
    return ", ".join(sorted({uses.run for uses in store.leases.uses()}))


def _size(folder: Path) -> int:
    """Return the bytes in a folder; files that vanish meanwhile count as 0, as does the target of a link."""
    total = 0
    if folder.is_symlink():
        return total
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align list``."""
    add_store(parser)


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align show``."""
    add_store(parser)
    parser.add_argument("key", metavar="KEY", help="the beginning of an artifact's key")
    parser.add_argument("--log", action="store_true", help="print the stage's log")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check the digest of every file, and look for files that are not in the record",
    )


def add_gc_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align gc``."""
    add_store(parser)
    parser.add_argument("--delete", action="store_true", help="delete the listed artifacts")


def run_push(options: argparse.Namespace) -> int:
    """Run ``align push``."""
    from align.runner.open_store import open_store

    store = open_store(None, options.store)
    if store.remote is None:
        raise UserError(
            "align push: the store has no bucket; give --store s3://bucket/prefix, or set $ALIGN_STORE to it."
        )
    # A bucket that does not answer is retried; say so instead of waiting silently.
    store.retry.log = lambda text: print(text, file=sys.stderr)
    has_damage = False
    if options.keys:
        artifacts = [store.resolve(key) for key in options.keys]
    else:
        artifacts, damaged = store.survey()
        print_damage(damaged)
        has_damage = bool(damaged)
    outcomes = []
    for artifact in artifacts:
        kind = artifact.record["kind"]
        key = artifact.record["key"]
        try:
            outcome = _upload(artifact, store.remote)
        except DamagedArtifact as error:  # here or in the bucket; the other artifacts are uploaded all the same
            print_damage([error])
            outcome = "damaged"
            has_damage = True
        outcomes.append({"kind": kind, "key": key, "outcome": outcome})
        if not options.json:
            print(f"{outcome:<9}  {kind}/{key[:12]}  {store.remote.address}")
    if options.json:
        print_json(outcomes)
    elif not artifacts:
        print(f"{store.root}: empty")
    return UserError.exit_code if has_damage else 0


def _upload(artifact: Artifact, remote: Remote) -> str:
    """Upload an artifact unless the bucket has it; return what happened, in a word or two."""
    if remote.find(artifact.record["kind"], artifact.record["key"]) is not None:
        return "there"
    return "uploaded" if remote.push(artifact) else "another's"


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align push``."""
    parser.add_argument("keys", nargs="*", metavar="KEY", help="the beginning of an artifact's key (default: all)")
    add_store(parser)


LIST = Handler(run_list, add_list_arguments)
SHOW = Handler(run_show, add_show_arguments)
GC = Handler(run_gc, add_gc_arguments)
PUSH = Handler(run_push, add_push_arguments)
