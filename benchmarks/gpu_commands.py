"""Run one item of the evidence for a GPU as processes of its own, within the seconds that are left.

Each function returns the item's result, or raises ``OutOfTime``. A process that is ended takes its children along.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.config.yaml import load_yaml
from align.evaluation.scorecard import Scorecard
from align.runner.huge_pages import page_environment
from align.runner.worker import ENVIRONMENT
from benchmarks.gpu_items import Item, Machine
from benchmarks.gpu_proofs import PROOFS

REPOSITORY = Path(__file__).parents[1]
TESTS = "tests/gpu"
GRACE = 45.0
"""Seconds in which a pipeline saves a checkpoint and ends."""
HELD_OUT = ("test_loss_after", "test_accuracy_after")
"""Metrics that a proof without a scorecard is judged by."""


class OutOfTime(Exception):
    """An item was stopped because the time of this command was over."""


@dataclass(frozen=True)
class Place:
    """Place in which items run and keep their files."""

    machine: Machine
    work: Path
    """Folder of models, logs and the quickstart's store; kept between commands."""
    settings: tuple[str, ...] = ()
    """Overrides of the quickstart, as ``align run --set`` takes them."""

    def log(self, name: str) -> Path:
        """Return the log file of an item."""
        folder = self.work / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / (re.sub(r"[^\w.]+", "-", name).strip("-") + ".log")


def run_command(
    command: list[str], log: Path, seconds: float, variables: Mapping[str, str] | None = None, grace: float = 0.0
) -> int:
    """Run a command with its output in ``log`` and return its exit code.

    ``grace`` seconds before the end of its time it is asked to stop at its next checkpoint (SIGUSR1). Raises
    ``OutOfTime`` when it had to be stopped.
    """
    stage = {**ENVIRONMENT, **page_environment()}
    environment = {**stage, "TOKENIZERS_PARALLELISM": "false", **os.environ, **(variables or {})}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY, start_new_session=True
        )
        try:
            return process.wait(timeout=max(0.1, seconds - grace))
        except subprocess.TimeoutExpired:
            if grace:
                process.send_signal(signal.SIGUSR1)
                _wait(process, grace)
            raise OutOfTime from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until a process ends, for at most so many seconds; the last third of them after an interrupt."""
    try:
        process.wait(timeout=seconds * 2 / 3)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=seconds / 3)
        except subprocess.TimeoutExpired:
            return


def last_line(log: Path) -> str:
    """Return the last line of a log that says something, for a table."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return (lines or ["no output"])[-1][:300]


# ---- stages ----


def run_stage_item(item: Item, place: Place, seconds: float) -> dict[str, Any]:
    """Run a stage as often as the item says, and return what the first run measured and whether all saved equal bits.

    ``failed`` is the last line of a run that failed, or says that deterministic runs differ.
    """
    assert item.stage is not None
    ends = time.monotonic() + seconds
    results: list[dict[str, Any]] = []
    for number in range(item.runs):
        log = place.log(f"{item.name} {number + 1}" if item.runs > 1 else item.name)
        command = [sys.executable, "-m", "benchmarks.gpu_run", str(place.work), json.dumps(asdict(item.stage))]
        if run_command(command, log, ends - time.monotonic()):
            return {"failed": last_line(log)}
        results.append(json.loads(last_json(log)))
    result = results[0]
    if item.runs > 1:
        digests = [entry.pop("sha256") for entry in results]
        result |= {"equal": len(set(digests)) == 1, "sha256": digests}
        if item.stage.deterministic and not result["equal"]:
            result["failed"] = "two runs with deterministic kernels saved different weights"
    return result


def run_peer(item: Item, place: Place, seconds: float) -> dict[str, Any]:
    """Run a peer's training once and return what it measured; ``failed`` is the last line of a run that failed."""
    assert item.peer is not None
    return _run_module("benchmarks.gpu_peers", asdict(item.peer), place.log(item.name), place, seconds)


def run_adapter(item: Item, place: Place, seconds: float) -> dict[str, Any]:
    """Measure one way of getting an adapter; ``failed`` is the last line of a run that failed."""
    assert item.adapter is not None
    return _run_module("benchmarks.gpu_adapters", asdict(item.adapter), place.log(item.name), place, seconds)


def _run_module(module: str, options: dict[str, Any], log: Path, place: Place, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", module, str(place.work), json.dumps(options)]
    if run_command(command, log, seconds):
        return {"failed": last_line(log)}
    result: dict[str, Any] = json.loads(last_json(log))
    return result


def last_json(log: Path) -> str:
    """Return the last line of a log that is a JSON object. Raises ``ValueError`` where there is none."""
    for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.startswith("{") and line.endswith("}") and '"' in line:
            return line
    raise ValueError(f"{log}: has no result")


# ---- tests ----


def list_tests(place: Place, seconds: float) -> list[str]:
    """Return the names of the test functions of one GPU. Raises ``RuntimeError`` where pytest finds none."""
    log = place.log("collect tests")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", TESTS, "--collect-only", "-p", "no:cacheprovider"]
    code = run_command(command, log, seconds)
    lines = log.read_text(encoding="utf-8").splitlines()
    names = list(dict.fromkeys(line.partition("[")[0] for line in lines if "::" in line and line.startswith(TESTS)))
    if code or not names:
        raise RuntimeError(f"pytest collected no test of {TESTS}: {last_line(log)} (the log is {log})")
    return names


def run_test(item: Item, place: Place, seconds: float) -> dict[str, Any]:
    """Run one test function with all its parameters; ``failed`` names the first that failed and its message."""
    log, report = place.log(item.name), place.work / "test.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", item.name, "--timeout", "900", "-p", "no:cacheprovider"]
    code = run_command([*command, f"--junitxml={report}"], log, seconds, {"ALIGN_GPU_TESTS_ON": place.machine.device})
    if not report.is_file():
        return {"failed": f"pytest ended with exit code {code}: {last_line(log)}"}
    return read_report(report)


def read_report(report: Path) -> dict[str, Any]:
    """Return the counts of a JUnit report: ``passed``, ``skipped`` with the first reason, ``failed`` with a message."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    result: dict[str, Any] = {"passed": 0, "skipped_tests": 0}
    for case in cases:
        failure = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        skip = case.find("skipped")
        if failure is not None:
            result.setdefault("failed", f"{case.get('name')}: {(failure.get('message') or '')[:300]}")
        elif skip is not None:
            result["skipped_tests"] += 1
            result.setdefault("reason", (skip.get("message") or "")[:300])
        else:
            result["passed"] += 1
    return result


# ---- pipelines ----


def run_quickstart(item: Item, place: Place, seconds: float) -> dict[str, Any]:
    """Run the quickstart, or go on with it, and return seconds by stage and the systems' scores with intervals.

    Under ``--tiny`` it is ``pipelines/smoke.yaml``.
    """
    name = "smoke" if place.machine.tiny else "quickstart"
    result, stages = _run_pipeline(f"pipelines/{name}.yaml", item, place, seconds, place.settings)
    if stages is None:
        return result
    return {**result, "engine": stages["ppo"]["metrics"].get("engine"), **scores(Path(stages["evaluate"]["path"]))}


def run_proof(item: Item, place: Place, seconds: float) -> dict[str, Any]:
    """Run a pipeline of a published result, or continue it, and return what it expects and what it measured."""
    path = REPOSITORY / PROOFS / f"{item.name}.yaml"
    result, stages = _run_pipeline(str(path), item, place, seconds)
    if stages is None:
        return result
    result["expected"] = load_yaml(path)["description"]
    if "evaluate" in stages:
        return {**result, **scores(Path(stages["evaluate"]["path"]))}
    *_, last = stages.values()
    return {**result, "measured": {name: last["metrics"][name] for name in HELD_OUT if name in last["metrics"]}}


def _run_pipeline(
    path: str, item: Item, place: Place, seconds: float, settings: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the seconds of a pipeline's stages and these, or ``failed`` and None."""
    log = place.log(item.name)
    command = [
        *(sys.executable, "-m", "align.cli.main", "run", path),
        *("--store", str(place.work / "store"), "--json", "--set", f"runtime.device={place.machine.device}"),
    ]
    for setting in settings:
        command += ["--set", setting]
    code = run_command(command, log, seconds, grace=min(GRACE, seconds / 3))
    document = None if code else last_document(log)
    if document is None:
        return {"failed": last_line(log)}, None
    stages = document["stages"]
    by_stage = {name: stage["seconds"] for name, stage in stages.items()}
    return {"stages": by_stage, "total": sum(by_stage.values())}, stages


def last_document(log: Path) -> dict[str, Any] | None:
    """Return the last JSON object that begins a line of its own; None without one. Libraries may print around it."""
    text = log.read_text(encoding="utf-8", errors="replace")
    for start in reversed(list(re.finditer(r"^\{$", text, re.MULTILINE))):
        try:
            document: dict[str, Any] = json.JSONDecoder().raw_decode(text, start.start())[0]
        except json.JSONDecodeError:
            continue
        return document
    return None


def scores(evaluation: Path) -> dict[str, Any]:
    """Return the deciding metric of a scorecard and its value, low and high of every system."""
    scorecard = Scorecard.read(evaluation)
    estimates = {system.name: scorecard.estimate(system.name) for system in scorecard.systems}
    return {
        "metric": scorecard.primary,
        "scores": {name: [entry.value, entry.low, entry.high] for name, entry in estimates.items()},
    }
