"""Runs for tests: a listener that records, runners as processes of other machines, an artifact without a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from align.pipeline.pipeline import Node
from align.runner.listener import Listener
from align.store.artifacts import Artifact
from align.store.store import Store
from tests.support.records import record_of


class Recorder(Listener):
    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        self.said.append(("cached", node.name))

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        self.said.append(("resumed" if resumed else "started", node.name))

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        self.said.append((event["event"], event.get("done", event.get("step"))))

    def waiting(self, node: Node, holder: str) -> None:
        self.said.append(("waits", holder))

    def transfer(self, message: str) -> None:
        self.said.append(("transfer", message))

    def warning(self, message: str) -> None:
        self.said.append(("warning", message))


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened"
        time.sleep(0.05)


RUNNER = """
import json, sys
from pathlib import Path
from align.store import locks
if sys.argv[1]:
    locks._machine = lambda: sys.argv[1]
from align import Pipeline
from tests.support.runs import Recorder
recorder = Recorder()
run = Pipeline(json.loads(sys.argv[2])).run(store=sys.argv[3], listener=recorder)
print(json.dumps({"ran": run.ran, "said": recorder.said}))
"""


def start(raw: dict[str, Any], store: Path, machine: str = "") -> subprocess.Popen[str]:
    """A runner as a process, on this machine or one that is called otherwise."""
    command = [sys.executable, "-c", RUNNER, machine, json.dumps(raw), str(store)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


def published(store: Store) -> Artifact:
    """An artifact as a runner publishes it, without one."""
    output = store.partial("number", "a" * 64) / "output"
    output.mkdir(parents=True)
    (output / "number.txt").write_text("1")
    record = record_of(stage="one")
    with store.lock("number", "a" * 64, lambda _: None) as hold:
        return store.publish(output, record, hold)
