"""A run as the command line shows it, here or on a cluster: progress, the page about it, the outcome.

``run.py`` and ``run_on_cluster.py`` say which executor runs the stages; this file shows it.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from align.cli.live_page import LivePage
from align.cli.parser import print_json
from align.errors import StageFailed, UserError, printable
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner.listener import ConsoleListener, Listener
from align.runner.open_store import open_store
from align.runner.runner import Run, run_pipeline
from align.runs.run_page import STOPPED, Failure, first_missing, outline_of, try_write_page
from align.store.artifacts import Artifact
from align.store.store import Store

FAILED = 1


class _SessionListener(Listener):
    """Remembers whether any stage began, which stage is running, and what failed."""

    has_begun: bool = False
    is_stopping: bool = False
    """True once the user was told that the stage stops."""
    current: tuple[Node, Path] | None = None
    failure: Failure | None = None

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        self.has_begun = True
        super().stage_cached(node, artifact)

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        self.has_begun = True
        self.current = (node, folder)
        super().stage_started(node, folder, resumed)

    def stage_done(self, node: Node, artifact: Artifact) -> None:
        self.current = None
        super().stage_done(node, artifact)

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        self.failure = Failure(node.name, message, log)
        super().stage_failed(node, message, log)

    def stage_stopping(self, node: Node, how: str) -> None:
        self.is_stopping = True
        super().stage_stopping(node, how)


class _QuietSession(_SessionListener):
    """The same for a run that prints one document: only that the run stops is printed, on standard error."""

    def stage_stopping(self, node: Node, how: str) -> None:
        super().stage_stopping(node, how)
        print(f"{printable(node.name)}: {how}", file=sys.stderr, flush=True)


class _ConsoleSession(_SessionListener, ConsoleListener):
    """The same, and shows everything on the console. The run's page is written from the first stage on."""

    def __init__(self, pipeline: Pipeline, console: Console | None, store: str | Path | Store | None) -> None:
        super().__init__(list(pipeline), console)
        self._pipeline = pipeline
        self._store = store
        self._page: LivePage | None = None
        self._cached: list[str] = []

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        self._cached.append(node.name)
        if self._page is not None:
            self._page.move(node.name, "cached")
        super().stage_cached(node, artifact)

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        if self._page is None:
            self._page = LivePage(self._pipeline.name, open_store(self._pipeline, self._store))
            self._page.state.cached += self._cached
            print_page(self._page.path, "Page while it runs")
        self._page.move(node.name, "running")
        super().stage_started(node, folder, resumed)

    def stage_done(self, node: Node, artifact: Artifact) -> None:
        if self._page is not None:
            self._page.move(node.name, "done")
        super().stage_done(node, artifact)

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        if self._page is not None:
            # On a cluster other stages may continue for hours.
            self._page.move(node.name, "failed")
        super().stage_failed(node, message, log)

    def close_page(self, is_complete: bool = False) -> None:
        """End the process that writes the page; it writes the final page of a complete run."""
        if self._page is not None:
            self._page.close(is_complete)


@dataclass(frozen=True)
class Outcome:
    """A run that came to its end, and the page about it; None if it could not be written."""

    run: Run
    page: Path | None


def run_and_report(
    pipeline: Pipeline, *, quiet: bool = False, console: Console | None = None, **options: Any
) -> Outcome:
    """Run ``pipeline`` here, with the options of ``run_pipeline``, and write its page as ``report_on`` does."""

    def run_here(listener: Listener) -> Run:
        with StopRequest(ctrl_c=True).handle_signals(signal.SIGUSR1) as stop:
            return run_pipeline(pipeline, listener=listener, stop=stop, **options)

    return report_on(run_here, pipeline, quiet=quiet, console=console, store=options.get("store"))


def report_on(
    run_with: Callable[[Listener], Run],
    pipeline: Pipeline,
    *,
    quiet: bool = False,
    console: Console | None = None,
    store: str | Path | Store | None = None,
) -> Outcome:
    """Show a run while ``run_with`` runs it, and write its page, also if it fails or is stopped.

    Raises what ``run_with`` raises, ``KeyboardInterrupt`` included, once the page is written and its path printed.
    """
    listener: _QuietSession | _ConsoleSession = _QuietSession()
    if not quiet:
        listener = _ConsoleSession(pipeline, console, store)
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(listener, _ConsoleSession):
                stack.callback(listener.close_page)
                stack.enter_context(listener)
            run = _run_with(run_with, listener)
            if isinstance(listener, _ConsoleSession):
                listener.close_page(is_complete=True)
    except (UserError, StageFailed, Stopped, KeyboardInterrupt) as error:
        if listener.has_begun:
            # A run that was refused before its first stage has no page.
            opened = open_store(pipeline, store)
            page = try_write_page(outline_of(pipeline), opened, _failure(listener, error, pipeline, opened))
            print_page(page, stream=sys.stderr if quiet else sys.stdout)
        raise
    cached = [name for name in run.artifacts if name not in run.ran]
    return Outcome(run, try_write_page(outline_of(pipeline), run.store, None, cached))


def _run_with(run_with: Callable[[Listener], Run], listener: _SessionListener) -> Run:
    """Return the run of ``run_with``. An interrupt between two stages is acknowledged before the page is written."""
    try:
        return run_with(listener)
    except KeyboardInterrupt:
        if not listener.is_stopping:
            print("stopping now", file=sys.stderr, flush=True)
        raise


def _failure(listener: _SessionListener, error: BaseException, pipeline: Pipeline, store: Store) -> Failure | None:
    """Return what ended the run, for the page: the failed stage, else the running one, else the next one."""
    if listener.failure is not None:
        return listener.failure
    was_stopped = isinstance(error, (KeyboardInterrupt, Stopped))
    message = STOPPED if was_stopped else str(error)
    status: Literal["stopped", "failed"] = "stopped" if was_stopped else "failed"
    if listener.current is not None:
        node, folder = listener.current
        log = folder / "log.txt"
        return Failure(node.name, message, log if log.is_file() else None, status)
    # Between two stages: the run stopped before the first stage that is still missing.
    missing = first_missing(pipeline, store)
    return None if missing is None else Failure(missing.name, message, None, status)


def print_page(page: Path | None, label: str = "Report", stream: Any = None) -> None:
    """Print the path of the page."""
    if page is not None:
        print(f"{label}: {printable(str(page.resolve()))}", file=stream or sys.stdout)


def print_failed_gates(run: Run) -> int:
    """Print the gates that failed on standard error; returns the exit code."""
    failed = run.failed_gates()
    for text in failed:
        print(f"gate failed: {printable(text)}", file=sys.stderr)
    return FAILED if failed else 0


def print_outcome(pipeline: Pipeline, outcome: Outcome, json: bool) -> int:
    """Print the outcome of a run that came to its end; returns the exit code."""
    if json:
        print_json(run_document(pipeline, outcome))
        return FAILED if outcome.run.failed_gates() else 0
    print(printable(result_of(outcome.run)))
    print_page(outcome.page)
    return print_failed_gates(outcome.run)


def result_of(run: Run) -> str:
    """Return the result of a run in a sentence."""
    # Imported late, because commands that show no result import this module as well.
    from align.report.run.training_health import result_sentence
    from align.report.scorecard.conclusions import load_scorecard

    artifacts = list(run.artifacts.values())
    return result_sentence(artifacts, load_scorecard(artifacts, None)[0])


def run_document(pipeline: Pipeline, outcome: Outcome) -> dict[str, Any]:
    """Return the run as one JSON document."""
    stages = {}
    for name, artifact in outcome.run.artifacts.items():
        stages[name] = {
            "key": artifact.record["key"],
            "path": str(artifact.path),
            "ran": name in outcome.run.ran,
            "seconds": artifact.record["seconds"],
            "metrics": artifact.record["metrics"],
        }
    return {
        "name": pipeline.name,
        "store": str(outcome.run.store.root),
        "stages": stages,
        "result": result_of(outcome.run),
        "report": None if outcome.page is None else str(outcome.page.resolve()),
        "failed_gates": outcome.run.failed_gates(),
    }
