"""Measure all that needs a GPU, in commands of at most nine minutes; call it until it says that all is done.

    python -m benchmarks.gpu_evidence [--part PART] [--out FOLDER]
    python -m benchmarks.gpu_evidence --device cpu --tiny --out FOLDER      # the same code on a processor
    python -m benchmarks.gpu_evidence --out FOLDER --table                  # the table of what is there

Every finished item is kept in ``FOLDER/PART.json`` and left out by the next call; ``FOLDER/table.md`` is written at the
end of each. Exit code 0: all done, 1: done and something failed, 75: the time is over, call it again. docs/gpu.md leads
through it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from benchmarks.gpu_commands import (
    REPOSITORY,
    OutOfTime,
    Place,
    last_json,
    last_line,
    list_tests,
    run_adapter,
    run_command,
    run_peer,
    run_proof,
    run_quickstart,
    run_stage_item,
    run_test,
)
from benchmarks.gpu_items import (
    PARTS,
    Item,
    Machine,
    adapter_items,
    card_items,
    determinism_items,
    peer_items,
    plan_items,
    training_items,
)
from benchmarks.gpu_proofs import proof_items
from benchmarks.gpu_results import Results
from benchmarks.gpu_table import make_table, summarize

LIMIT = 540.0
"""Seconds of one command."""
UNFINISHED = 75
"""Exit code of a command whose time is over (EX_TEMPFAIL), as that of a stopped run."""
FIRST_ITEM = 60.0
"""Seconds that an item is expected to take while its part has no result."""
COLLECTION = "collection"
"""Name of the item that says why there are no tests."""
WHOLE = 0.9
"""Share of the limit that an item must have had before it counts as too long for any command."""


@dataclass
class Session:
    """One command: its place, its results, and the time at which it ends."""

    place: Place
    results: Results
    limit: float
    only: str = ""
    retry: bool = False

    def __post_init__(self) -> None:
        self.ends = time.monotonic() + self.limit

    @property
    def seconds_left(self) -> float:
        """Return the seconds until this command must end."""
        return self.ends - time.monotonic()

    def run_part(self, part: str) -> bool:
        """Run the items of a part that have no result yet; return False where the time is over before all have one."""
        try:
            items = [item for item in self.list_items(part) if self.only in item.name]
        except OutOfTime:
            print(f"{part}: the time is over. Run the same command again to go on.")
            return False
        for item in items:
            if item.obstacle is not None:
                self.results.put(part, item.name, {"skipped": item.obstacle})
        runnable = [item for item in items if item.obstacle is None]
        for item in runnable:
            if self.results.is_done(part, item.name, retry=self.retry):
                continue
            if not self._run_item(part, item):
                done = sum(self.results.is_done(part, item.name) for item in runnable)
                print(f"{part}: {done} of {len(runnable)} items are done. Run the same command again to go on.")
                return False
        return True

    def list_items(self, part: str) -> list[Item]:
        """Return the items of a part."""
        machine = self.place.machine
        if part == "tests":
            return [Item(name) for name in self._test_names()]
        if part == "quickstart":
            return [Item("quickstart")]
        lists: dict[str, Callable[[Machine], list[Item]]] = {
            "training": training_items,
            "plan": plan_items,
            "card": card_items,
            "peers": peer_items,
            "adapters": adapter_items,
            "determinism": determinism_items,
            "proof": proof_items,
        }
        return lists[part](machine)

    def _test_names(self) -> list[str]:
        """Return the names of the tests, which pytest is asked for once; no name where it cannot collect them."""
        names = self.results.listed("tests")
        if names and not self.retry:
            return names
        try:
            names = list_tests(self.place, self.seconds_left)
        except RuntimeError as error:
            self.results.put("tests", COLLECTION, {"failed": str(error), "seconds": 0.0})
            print(f"tests: {error}", flush=True)
            return []
        self.results.list_items("tests", names)
        return names

    def _run_item(self, part: str, item: Item) -> bool:
        """Run one item and keep its result; return False where the time does not suffice."""
        seconds = self.seconds_left
        is_whole = seconds >= WHOLE * self.limit
        if not is_whole and seconds < self._expected_seconds(part):
            return False
        started = time.monotonic()
        try:
            result = RUN.get(part, run_stage_item)(item, self.place, seconds)
        except OutOfTime:
            # A pipeline continues where it was; any other item would start over, and never end.
            if part in RUN_PIPELINES or not is_whole:
                return False
            result = {"failed": f"took longer than the {self.limit:.0f} seconds of a command (--limit)"}
        result["seconds"] = time.monotonic() - started
        self.results.put(part, item.name, result)
        print(f"{part}: {item.name}: {summarize(result)} ({result['seconds']:.0f} s)", flush=True)
        return True

    def _expected_seconds(self, part: str) -> float:
        """Return the seconds that an item may take: those of the longest so far, and a fifth more."""
        longest = self.results.longest(part)
        return FIRST_ITEM if longest is None else 1.2 * longest


RUN_PIPELINES: dict[str, Callable[[Item, Place, float], dict[str, Any]]] = {
    "quickstart": run_quickstart,
    "proof": run_proof,
}
"""How the items of the parts that are pipelines are run."""
RUN: dict[str, Callable[[Item, Place, float], dict[str, Any]]] = {
    "tests": run_test,
    "peers": run_peer,
    "adapters": run_adapter,
    **RUN_PIPELINES,
}
"""How the items of a part are run; those of the others are stages."""


def describe_machine(place: Place, seconds: float) -> dict[str, Any]:
    """Return the card and the versions, from a process of its own. Raises ``UserError`` where torch fails."""
    log = place.log("machine")
    command = [sys.executable, "-m", "benchmarks.gpu_machine", place.machine.device]
    try:
        code = run_command(command, log, seconds)
    except OutOfTime:
        raise UserError(f"torch did not start within {seconds:.0f} s. Give the command more by --limit.") from None
    if code:
        raise UserError(f"torch does not start here: {last_line(log)} Repair its installation; the log is {log}.")
    machine: dict[str, Any] = json.loads(last_json(log))
    return machine


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="run this part alone; repeatable")
    parser.add_argument("--out", type=Path, default=Path("gpu-evidence"), help="folder of the results and of table.md")
    parser.add_argument("--results", type=Path, action="append", default=[], metavar="FOLDER",
                        help="results of earlier commands, to be taken over; repeatable")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "align-gpu-evidence",
                        help="folder of models, logs and the quickstart's store, kept between commands")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of two layers, short rows, the smoke pipeline")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of this command")
    parser.add_argument("--only", default="", help="items whose name contains this")
    parser.add_argument("--retry", action="store_true", help="run items again that failed")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override of the quickstart")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run what has no result yet, within the limit, and write the table; exit code 2 where that cannot begin."""
    try:
        return run(parse_options(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Run what the options say and return the exit code."""
    results = Results(options.out, options.results)
    if options.table:
        print(make_table(results.parts))
        return 0
    place = Place(Machine(options.device, options.tiny), options.work.resolve(), tuple(options.set))
    machine = describe_machine(place, options.limit)
    if "absent" in machine:
        print(f"Nothing is measured: {machine['absent']}. `--device cpu --tiny` runs the same code on a processor.")
        return 0
    session = Session(place, results, options.limit, options.only, options.retry)
    results.machine = machine | {"commit": _commit(), "tiny": options.tiny}
    results.write()
    parts = [part for part in PARTS if part in (options.part or PARTS)]
    finished = all(session.run_part(part) for part in parts)
    table = make_table(results.parts)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(f"The results and table.md are in {options.out}, the logs in {place.work / 'logs'}.")
    if not finished:
        return UNFINISHED
    return 1 if results.failed(parts) else 0


def _commit() -> str | None:
    """Return the commit that is measured; None for a copy without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=REPOSITORY)
    except OSError:
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
