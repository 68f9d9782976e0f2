"""``align run``: run a pipeline, show how it goes, and write the page about it, however it ends."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from align.cli.console import ConsoleListener, printable
from align.cli.parser import print_json
from align.cli.run_page import STOPPED, Failure, first_missing, run_of, try_page
from align.errors import StageFailed, UserError
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import Stopped
from align.runner.listener import Listener
from align.runner.open_store import open_store
from align.runner.prepare import RunOptions
from align.runner.runner import Run, run_pipeline
from align.store.artifacts import Artifact
from align.store.store import Store

FAILED = 1


class _Watching(Listener):
    """Remembers whether anything began, what is under way, and what failed."""

    begun: bool = False
    current: tuple[Node, Path] | None = None
    failure: Failure | None = None

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        self.begun = True
        super().stage_cached(node, artifact)

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        self.begun, self.current = True, (node, folder)
        super().stage_started(node, folder, resumed)

    def stage_done(self, node: Node, artifact: Artifact) -> None:
        self.current = None
        super().stage_done(node, artifact)

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        self.failure = Failure(node.name, message, log)
        super().stage_failed(node, message, log)


class _Silent(_Watching):
    pass


class _Shown(_Watching, ConsoleListener):
    pass


@dataclass(frozen=True)
class Outcome:
    """A run that came to its end, and the page about it; None where that could not be written."""

    run: Run
    page: Path | None


def run_and_report(
    pipeline: Pipeline, *, quiet: bool = False, console: Console | None = None, **options: Any
) -> Outcome:
    """Run ``pipeline`` here (options as of ``run_pipeline``) and write its page, as ``report_on`` does."""

    def run(listener: Listener) -> Run:
        return run_pipeline(pipeline, listener=listener, **options)

    return report_on(run, pipeline, quiet=quiet, console=console, store=options.get("store"))


def report_on(
    make: Callable[[Listener], Run],
    pipeline: Pipeline,
    *,
    quiet: bool = False,
    console: Console | None = None,
    store: str | Path | Store | None = None,
) -> Outcome:
    """Show a run while ``make`` makes it, and write its page, also where it fails or is stopped.

    Raises what ``make`` raises, ``KeyboardInterrupt`` included, after the page was written and its path said.
    """
    watch: _Silent | _Shown = _Silent() if quiet else _Shown(list(pipeline), console)
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(watch, _Shown):
                stack.enter_context(watch)
            run = make(watch)
    except (UserError, StageFailed, Stopped, KeyboardInterrupt) as error:
        if watch.begun:
            opened = open_store(pipeline, store)
            page = try_page(run_of(pipeline), opened, _why(watch, error, pipeline, opened))
            say_page(page, sys.stderr if quiet else sys.stdout)
        raise
    found = [name for name in run.artifacts if name not in run.ran]
    return Outcome(run, try_page(run_of(pipeline), run.store, None, found))


def _why(watch: _Watching, error: BaseException, pipeline: Pipeline, store: Any) -> Failure | None:
    """What stopped the run, for the page."""
    stopped = isinstance(error, (KeyboardInterrupt, Stopped))
    message = STOPPED if stopped else str(error)
    if watch.failure is not None:
        return watch.failure
    if watch.current is not None:
        node, folder = watch.current
        log = folder / "log.txt"
        return Failure(node.name, message, log if log.is_file() else None, "stopped" if stopped else "failed")
    missing = first_missing(pipeline, store)
    return None if missing is None else Failure(missing.name, message, None, "stopped" if stopped else "failed")


def say_page(page: Path | None, stream: Any = None) -> None:
    """The one line about the page."""
    if page is not None:
        print(f"Report: {printable(str(page.resolve()))}", file=stream or sys.stdout)


def say_gates(run: Run) -> int:
    """Name the gates that failed, on standard error; the exit code that follows from them."""
    failed = run.failed_gates()
    for text in failed:
        print(f"gate failed: {printable(text)}", file=sys.stderr)
    return FAILED if failed else 0


def load(options: argparse.Namespace) -> Pipeline:
    """Load the pipeline of the command line with its ``--set`` options."""
    return Pipeline.load(options.pipeline, options.assignments)


def run(options: argparse.Namespace) -> int:
    """run the pipeline and write its report; finished stages are skipped, a killed one resumes"""
    pipeline = load(options)
    how = RunOptions(options.store, options.only, options.from_, tuple(options.rebuild), options.strict)
    if options.on == "slurm":
        from align.cli.run_on_slurm import run_on_slurm

        return run_on_slurm(pipeline, how, detach=options.detach, json=options.json)
    if options.detach:
        raise UserError("--detach leaves a run to a queue that lives without this command: give --on slurm, too.")
    if options.on == "ray":
        from align.cli.run_on_ray import run_on_ray

        return run_on_ray(pipeline, how, json=options.json)
    try:
        outcome = run_and_report(pipeline, quiet=options.json, **vars(how))
    except KeyboardInterrupt:
        print("\nStopped; finished stages and checkpoints are kept. The same command continues.", file=sys.stderr)
        raise
    except Stopped as error:
        raise Stopped(f"{error} Finished stages and checkpoints are kept. The same command continues.") from None
    return say_outcome(pipeline, outcome, options.json)


def say_outcome(pipeline: Pipeline, outcome: Outcome, json: bool) -> int:
    """What a run that came to its end leaves on the screen; the exit code."""
    if json:
        print_json(run_document(pipeline, outcome))
        return FAILED if outcome.run.failed_gates() else 0
    say_page(outcome.page)
    return say_gates(outcome.run)


def run_document(pipeline: Pipeline, outcome: Outcome) -> dict[str, Any]:
    """The run as one JSON document."""
    stages = {
        name: {"key": artifact.record["key"], "path": str(artifact.path), "ran": name in outcome.run.ran,
               "seconds": artifact.record["seconds"], "metrics": artifact.record["metrics"]}
        for name, artifact in outcome.run.artifacts.items()
    }  # fmt: skip
    return {
        "name": pipeline.name,
        "store": str(outcome.run.store.root),
        "stages": stages,
        "report": None if outcome.page is None else str(outcome.page.resolve()),
        "failed_gates": outcome.run.failed_gates(),
    }
