"""Time and memory of the studio's list of runs, with a generated store.

    python -m benchmarks.studio [--runs 200] [--stages 8] [--reads 300]

Every run has six stages that no other run has, and two that all runs share; every tenth run has stopped in its last but
one stage. A record has the size of a real one (9 kB), and a training stage has 2,000 steps of 12 metrics.
The first list of a new studio reads every record; later lists read what has changed. Then every run's page and its
curves are read once, and the list again and again; the process must not grow meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from align.store.fingerprint import digest
from align.store.leases import write_run
from align.store.record import write_record
from align.store.store import Store
from align.studio.app import create_app
from align.studio.context import StudioContext

KINDS = ("model", "data", "sft", "reward", "ppo", "dpo", "evaluate", "report")
SHARED = 2
STEPS = 2000
METRICS = 12
TOKEN = "benchmark"
PADDING = 8000
"""Bytes of settings and versions in a record."""


def main() -> None:
    """Make the store, measure, and print one line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--stages", type=int, default=len(KINDS))
    parser.add_argument("--reads", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "store")
        started = time.perf_counter()
        fill(store, options.runs, KINDS[: options.stages])
        print(f"store: {options.runs} runs of {options.stages} stages, made in {time.perf_counter() - started:.0f} s")
        measure(store, options.reads)


def measure(store: Store, reads: int) -> None:
    """Print the times of lists and pages, and the memory of this process."""
    client = TestClient(create_app(StudioContext(store), TOKEN), base_url="http://127.0.0.1:8010")
    client.cookies.set("align-studio", TOKEN)
    client.get("/")
    show("first list", [ask(client, "runs")])
    names = [run["name"] for run in client.get("/api/runs").json()["runs"]]
    print(f"list: {len(client.get('/api/runs').content) / 1000:.0f} kB")
    time.sleep(1)
    show("second list", [ask(client, "runs")])
    show("first page of a run", [ask(client, f"runs/{name}") for name in names])
    show("second page of a run", [ask(client, f"runs/{name}") for name in names])
    show("curves of a stage", [ask(client, f"runs/{name}/stages/ppo/curves") for name in names])
    time.sleep(1)
    show("list, all records read", [ask(client, "runs")])
    before = memory()
    for index in range(reads):
        ask(client, "runs")
        ask(client, f"runs/{names[index % len(names)]}")
    print(f"memory: {before:.0f} MB, after {reads} more lists and pages {memory():.0f} MB")


def show(title: str, times: list[tuple[float, float]]) -> None:
    """Print the median and the largest time of requests, by the clock and of the processor."""
    clock = [1000 * seconds for seconds, _ in times]
    processor = [1000 * seconds for _, seconds in times]
    print(
        f"{title}: {statistics.median(clock):.0f} ms, at most {max(clock):.0f} ms; "
        f"of the processor {statistics.median(processor):.0f} ms, at most {max(processor):.0f} ms"
    )


def ask(client: TestClient, path: str) -> tuple[float, float]:
    """Return the seconds of one request, by the clock and of this process. Other programs also use the cores."""
    started = time.perf_counter(), time.process_time()
    answer = client.get(f"/api/{path}")
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - started[0], time.process_time() - started[1]


def memory() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def fill(store: Store, runs: int, kinds: tuple[str, ...]) -> None:
    """Write the records of ``runs`` runs and their stages."""
    events = "".join(event_lines())
    for number in range(runs):
        stages: dict[str, dict[str, str]] = {}
        inputs: dict[str, Any] = {}
        for place, kind in enumerate(kinds):
            owner = "all" if place < SHARED else number
            key = digest([kind, owner])
            stages[kind] = {"kind": kind, "key": key}
            if number % 10 == 9 and place == len(kinds) - 2:
                begin(store.partial(kind, key), events)
            elif not (number % 10 == 9 and place == len(kinds) - 1):
                finish(store.folder(kind, key), kind, key, inputs, events if kind in ("sft", "ppo") else "")
            inputs = {kind: key}
        pipeline = {"name": f"run-{number}", "stages": {kind: {} for kind in kinds}}
        write_run(store.root, f"run-{number}", stages, pipeline)


def event_lines() -> list[str]:
    """Return the event file of a training stage."""
    lines = []
    for step in range(STEPS):
        values = {f"metric_{index}": 1 / (1 + step + index) for index in range(METRICS)}
        lines.append(json.dumps({"event": "progress", "time": step, "done": step + 1, "total": STEPS}) + "\n")
        lines.append(json.dumps({"event": "metrics", "time": step, "step": step, **values}) + "\n")
    return lines


def begin(folder: Path, events: str) -> None:
    """Write the folder of a stage that has stopped."""
    (folder / "checkpoints" / "step-10").mkdir(parents=True)
    (folder / "events.jsonl").write_text(events)
    (folder / "log.txt").write_text("a log\n" * 100)


def finish(folder: Path, kind: str, key: str, inputs: dict[str, Any], events: str) -> None:
    """Write a finished artifact without outputs."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("a log\n" * 100)
    if events:
        (folder / "events.jsonl").write_text(events)
    links = [{"stage": name, "kind": name, "key": digest_of} for name, digest_of in inputs.items()]
    record = {
        "key": key,
        "kind": kind,
        "stage": kind,
        "makes": "PolicyCheckpoint",
        "created": "2026-12-01T10:00:00",
        "outputs": {},
        "metrics": {"loss": 0.5, "tokens": 1000},
        "parts": {},
        "tokens": 1000,
        "seconds": 100.0,
        "peak_memory_bytes": 2**30,
        "config": {"padding": "x" * PADDING},
        "input_stages": links,
    }
    write_record(folder, record)


if __name__ == "__main__":
    main()
