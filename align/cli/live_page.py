"""The page of an unfinished run: its finished, running and waiting stages, and the finished stages' results.

A separate process writes it, so the runner loads neither matplotlib nor pyarrow. The runner sends the state of its
stages through a pipe. The end of the pipe without a last word means that the runner is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.runner.open_store import Opening
from align.runs.run_page import PAGE, RUNNING, Failure, RunOutline, find_failure, stored_outline, write_page
from align.store.artifacts import LOG
from align.store.store import REPORTS, Store

START_AFTER = 5.0
"""Seconds of a run before its page is written: a run that ends sooner has its final page at once."""
EVERY = 30.0
"""Seconds between two pages while one stage runs; the page reloads itself as often."""
SHARE_OF_TIME = 0.05
"""Largest share of the time that goes into writing pages while one stage runs: the run needs the processors."""
SHARE_OF_CHANGES = 0.2
"""The same while stages begin and end, which a reader waits to see."""
NICENESS = 10
SETTLE = 1.0
"""Seconds that a state without a running stage waits: mostly the next stage starts at once, or the run ends."""
SECONDS_TO_END = 20.0
"""Time that the writer has to finish a page when the run ends."""
SECONDS_FOR_FINAL_PAGE = 60.0
"""Time that it has for that and the final page of a complete run."""


@dataclass
class RunState:
    """Names of a run's stages by state; stages in none of the lists wait."""

    cached: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    """In the order of their start; only a cluster runs several at once."""
    failed: list[str] = field(default_factory=list)
    has_ended: bool = False
    is_complete: bool = False
    """The run has come to its end, so its final page is due."""

    def move(self, name: str, target: list[str]) -> None:
        """Move a stage into a list, out of ``running`` and ``failed``."""
        for names in (self.running, self.failed):
            if name in names:
                names.remove(name)
        target.append(name)


class LivePage:
    """The runner's side: starts the writer a little after the run's first stage, and tells it what runs."""

    def __init__(self, run: str, store: Store) -> None:
        self.path = store.root / REPORTS / run / PAGE
        self.state = RunState()
        self._command = [sys.executable, "-m", "align.cli.live_page", json.dumps(asdict(Opening.of(store))), run]
        self._process: subprocess.Popen[str] | None = None
        # Re-entrant: a signal's handler may report a stage's end while its start is being sent.
        self._lock = threading.RLock()
        self._timer = threading.Timer(START_AFTER, self._start)
        self._timer.daemon = True
        self._timer.start()

    def move(self, name: str, state: str) -> None:
        """Tell the writer that a stage is now ``cached``, ``running``, ``done`` or ``failed``."""
        self.state.move(name, getattr(self.state, state))
        self.send()

    def send(self) -> None:
        """Tell the writer the state, if it has been started."""
        with self._lock:
            if self._process is None or self._process.stdin is None:
                return
            # A writer that is gone must not end the run; the final page says what is wrong with pages.
            with contextlib.suppress(OSError):
                self._process.stdin.write(json.dumps(asdict(self.state)) + "\n")
                self._process.stdin.flush()

    def close(self, is_complete: bool = False) -> None:
        """End the writer after the page that it may be writing, and after the final page of a complete run.

        The writer has matplotlib and most figures already, which the runner would load and draw in some seconds. The
        runner still asks for the final page: it is not written twice, and written here if the writer is gone.
        """
        self._timer.cancel()
        with self._lock:
            self.state.has_ended = True
            self.state.is_complete = is_complete
            self.send()
            process = self._process
            self._process = None
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(SECONDS_FOR_FINAL_PAGE if is_complete else SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self) -> None:
        with self._lock:
            if self.state.has_ended:
                return
            # The writer has a separate session, because the runner handles Ctrl-C. If no process can be started, the
            # run continues, and the final page is the first.
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            self.send()


def write_pages(run: str, store: Store, states: Iterator[RunState | None]) -> None:
    """Write the page of ``run`` at each state. ``None`` stands for the end of a runner that took no leave."""
    outline = stored_outline(run, store.runs()[run])
    for state in states:
        if state is None:
            # The last page would reload itself for ever.
            write_page(outline, store, find_failure(outline, store), always=False)
        elif state.is_complete:
            with contextlib.suppress(UserError, OSError):
                write_page(outline, store, cached=state.cached, always=False)
        elif not state.has_ended and (state.running or state.cached or state.done):
            write_state(outline, store, state)


def write_state(outline: RunOutline, store: Store, state: RunState) -> Path | None:
    """Write the page that shows ``state``; None if it has no content yet, or no page can be written."""
    failure = None
    # A full disk or a folder that does not answer may be back when the next page is due.
    with contextlib.suppress(UserError, OSError):
        if state.running:
            name = state.running[-1]
            log = store.partial(*outline.stages[name]) / LOG
            failure = Failure(name, RUNNING, log if log.is_file() else None, "running")
        return write_page(
            outline,
            store,
            failure,
            cached=state.cached,
            always=False,
            refresh=round(EVERY),
            finished={*state.cached, *state.done},
            states=dict.fromkeys(state.running[:-1], "running") | dict.fromkeys(state.failed, "failed"),
        )
    return None


def read_states(pipe: int, every: float = EVERY) -> Iterator[RunState | None]:
    """Yield the newest state from ``pipe``, and the last state again after ``every`` seconds without news.

    Ends after a state of a run that has ended, or with ``None`` if the pipe ends before. Waits longer after a page that
    took long, unless the run has ended.
    """
    state: RunState | None = None
    text = b""
    is_news = False
    news_due = repeat_due = 0.0
    while True:
        # Between two pages, news waits for less long than the last state does.
        due = news_due if is_news else repeat_due
        seconds = every if state is None else max(0.0, due - time.monotonic())
        if select.select([pipe], [], [], seconds)[0]:
            piece = os.read(pipe, 1 << 16)
            if not piece:
                yield None
                return
            *lines, text = (text + piece).split(b"\n")
            if not lines:
                continue
            # Of several states only the newest is worth a page.
            state = RunState(**json.loads(lines[-1]))
            is_news = True
            if not state.running:
                news_due = max(news_due, time.monotonic() + SETTLE)
            if not state.has_ended and time.monotonic() < news_due:
                continue
        if state is None:
            continue
        started = time.monotonic()
        yield state
        if state.has_ended:
            return
        is_news = False
        spent = time.monotonic() - started
        news_due = started + spent / SHARE_OF_CHANGES
        repeat_due = started + max(every, spent / SHARE_OF_TIME)


def main(words: list[str]) -> None:
    """Write pages until standard input ends; ``words`` are the store's ``Opening`` as JSON and the run's name."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    opening: dict[str, Any] = json.loads(words[0])
    # Pages show the folder's contents; a bucket is not asked.
    store = Opening(**{**opening, "remote": None}).open()
    write_pages(words[1], store, read_states(sys.stdin.fileno()))


if __name__ == "__main__":
    main(sys.argv[1:])
