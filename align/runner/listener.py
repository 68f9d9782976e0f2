"""Listeners, which are told what happens during a run: a terminal or a log. Never imports torch.

A terminal shows a live line per stage, a log plain lines.
"""

from __future__ import annotations

import textwrap
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from align.errors import plain_number, printable, redact
from align.pipeline.context import Pace, duration
from align.pipeline.pipeline import Node
from align.registry import Stage
from align.store.artifacts import Artifact, Kind

SHOWN = ("loss", "score", "gold", "accuracy", "kl")
"""Values that a stage may show next to its bar, in this order."""
PARTS = "parts"
"""Unit of work whose pieces are not alike."""
MAX_NUMBERS = 4
"""Numbers in the closing line of a stage that has no headline."""
REPORT_EVERY = 60.0
"""Seconds between two lines about a running stage where output is not a terminal."""
FIRST_REPORT = 10.0
"""Seconds after a stage's start at which the first of these lines comes."""
WIDE = 100
"""Columns of a terminal that has room for a long bar."""


class Listener:
    """Receives what happens during a run, as the console does. This listener is silent."""

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        """A finished stage was found."""

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        """A stage's process starts; ``resumed`` when an earlier attempt left checkpoints."""

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        """One line of the stage's event file."""

    def stage_done(self, node: Node, artifact: Artifact) -> None:
        """The stage's artifact is published."""

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        """The stage ended without an artifact."""

    def stage_stopping(self, node: Node, how: str) -> None:
        """The stage was asked to stop, or is ended now; ``how`` says it in words."""

    def stage_queued(self, node: Node, how: str) -> None:
        """The stage has its place in a cluster's queue, or another place than before; ``how`` says it in words."""

    def waiting(self, node: Node, holder: str) -> None:
        """Another run holds the stage's lock."""

    def transfer(self, message: str) -> None:
        """A finished stage is fetched from the store's remote or uploaded to it."""

    def warning(self, message: str) -> None:
        """Something the user should know."""


@dataclass
class RunningStage:
    """Progress of a stage in this attempt; times are seconds of ``time.time``."""

    started: float = field(default_factory=time.time)
    pace: Pace = field(default_factory=Pace)
    """Progress of the work in hand."""
    phase: str = "importing"
    """Current work of the stage, between two reports of progress."""
    reported: float = field(default_factory=time.time)
    """Time of the last line about the stage."""
    pause: float = field(default_factory=lambda: FIRST_REPORT)
    """Seconds until the next line."""
    heard: float = 0.0
    """Time of the last event."""

    def status(self) -> str:
        """Return ``12/40 steps · 2m 10s left · 310 tok/s · loss 1.23``; empty before the first progress event."""
        event = self.pace.last
        if event is None:
            return ""
        unit = event.get("unit", "")
        parts = [f"{plain_number(event['done'])}/{plain_number(event['total'])} {unit}"]
        if event.get("step"):
            parts.append(str(event["step"]))
        seconds_left = self.pace.seconds_left()
        tokens = self.pace.tokens_per_second()
        units = self.pace.units_per_second()
        # Parts of a stage differ in duration: the first parts predict nothing. Other work follows the last unit.
        if seconds_left is not None and unit != PARTS and event["done"] < event["total"]:
            parts.append(f"{duration(seconds_left)} left")
        if tokens is not None:
            parts.append(f"{tokens:.0f} tok/s")
        elif units is not None and unit != PARTS:
            parts.append(_rate(units, unit))
        for name in SHOWN:
            if isinstance(event.get(name), (int, float)):
                parts.append(f"{name} {event[name]:.3g}")
        return " · ".join(parts)

    def report(self, now: float) -> str:
        """Return the line for a log: the status, and for how long the stage has been silent."""
        if self.pace.last is None:
            return f"running for {duration(now - self.started)}: {self.phase}"
        parts = (self.status(), self.phase, silence(now - max(self.heard, self.pace.last["time"])))
        return " · ".join(part for part in parts if part)


def silence(seconds: float) -> str:
    """Return ``silent for 5m 30s``; empty for less than a minute."""
    return f"silent for {duration(seconds)}" if seconds >= REPORT_EVERY else ""


def _rate(per_second: float, unit: str) -> str:
    """Return a rate per second, or per minute where that is less than one a second."""
    if per_second >= 100:
        return f"{per_second:,.0f} {unit}/s"
    if per_second >= 1:
        return f"{per_second:.3g} {unit}/s"
    return f"{60 * per_second:.3g} {unit}/min"


class ConsoleListener(Listener):
    """A live line per stage in a terminal; elsewhere lines at its start, after 10 s, every minute and at its end."""

    def __init__(self, pipeline_nodes: list[Node], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.live = self.console.is_terminal
        self.width = max((len(node.name) for node in pipeline_nodes), default=8)
        self.running: dict[str, RunningStage] = {}
        """Running stages by name; on a cluster several run at once."""
        self.progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24 if self.console.width >= WIDE else 10),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=False,
        )
        self.tasks: dict[str, TaskID] = {}
        """Progress bars by stage."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._reporter = threading.Thread(target=self._report_every_minute, name="progress-lines", daemon=True)

    def __enter__(self) -> ConsoleListener:
        if self.live:
            self.progress.start()
        else:
            # A separate thread, because a stage that loads an engine sends no events for minutes.
            self._reporter.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.progress.stop()
        else:
            self._closed.set()
            self._reporter.join()

    def _report_every_minute(self) -> None:
        while not self._closed.wait(1.0):
            self.report_running(time.time())

    def report_running(self, now: float) -> None:
        """Print a line about each running stage, 10 s after its start and then every minute."""
        with self._lock:
            for name, stage in self.running.items():
                if now - stage.reported >= stage.pause:
                    stage.reported = now
                    stage.pause = REPORT_EVERY
                    self._print_line("▸", name, stage.report(now))

    def _print_line(self, mark: str, name: str, text: str, style: str = "") -> None:
        start = f"{mark} {name:<{self.width}}  "
        content = printable(redact(text))
        if self.live:
            # Further lines of a long text begin below its first word. A log keeps one line for one fact.
            content = textwrap.fill(
                content,
                max(self.console.width, len(start) + 20),
                initial_indent=start,
                subsequent_indent=" " * len(start),
                break_on_hyphens=False,
            )[len(start) :]
        line = f"{start}{escape(content)}"
        self.console.print(f"[{style}]{line}[/]" if style else line, soft_wrap=True)

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        """Print a dim line with the stage's result."""
        self._print_line("·", node.name, f"cached  {_headline(node.stage, artifact)}", "dim")

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        """Add a progress bar in a terminal, print a line elsewhere."""
        self._drop_task(node)
        with self._lock:
            self.running[node.name] = RunningStage()
        text = "resumes" if resumed else "starts"
        if self.live:
            self.tasks[node.name] = self.progress.add_task(f"{node.name:<{self.width}}", total=None, status=text)
        else:
            self._print_line("▸", node.name, text)

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        """Update the progress bar; print warnings and notes."""
        if node.name in self.running:
            self.running[node.name].heard = event.get("time", 0.0)
        if event.get("event") == "warning":
            self._print_line("!", node.name, str(event.get("message")), "yellow")
        elif event.get("event") == "note":
            self._print_line("·", node.name, str(event.get("message")))
        elif event.get("event") == "phase" and node.name in self.running:
            with self._lock:
                stage = self.running[node.name]
                stage.phase = str(event["text"])
            if node.name in self.tasks:
                status = " · ".join(part for part in (stage.status(), stage.phase) if part)
                self.progress.update(self.tasks[node.name], status=escape(printable(status)))
        elif event.get("event") == "progress" and node.name in self.running:
            with self._lock:
                stage = self.running[node.name]
                stage.pace.update(event)
                # A finished unit of work ends the phase that was shown before it.
                stage.phase = ""
            if node.name in self.tasks:
                task = self.tasks[node.name]
                status = escape(printable(stage.status()))
                self.progress.update(task, total=event["total"], completed=event["done"], status=status)

    def stage_done(self, node: Node, artifact: Artifact) -> None:
        """Print time, peak memory and the stage's result."""
        self._drop_task(node)
        record = artifact.record
        memory = (record.get("peak_memory_bytes") or 0) / 2**30
        costs = f"{duration(record['seconds']):>7}  {memory:4.1f} GiB"
        text = f"{costs}  {_headline(node.stage, artifact)}{_earlier_attempts(record)}"
        alarms = (record.get("metrics") or {}).get("alarms")
        if alarms:
            # Its result exists, but may be of no use.
            self._print_line("!", node.name, f"{text}  alarms: {'; '.join(alarms)}", "yellow")
        else:
            self._print_line("✓", node.name, text, "green")

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        """Print that the stage failed; the command prints the message itself."""
        stage = self._drop_task(node)
        after = "" if stage is None else f" after {duration(time.time() - stage.started)}"
        self._print_line("✗", node.name, f"failed{after}", "red")

    def stage_stopping(self, node: Node, how: str) -> None:
        """Print at once how the stage stops: the end may come much later."""
        self._print_line("…", node.name, how, "yellow")

    def _drop_task(self, node: Node) -> RunningStage | None:
        """Forget a stage that no longer runs; return its last state, or None if it was not running."""
        task = self.tasks.pop(node.name, None)
        if task is not None:
            self.progress.remove_task(task)
        with self._lock:
            return self.running.pop(node.name, None)

    def stage_queued(self, node: Node, how: str) -> None:
        """Print the stage's state in a cluster's queue."""
        # A preempted job is back in the queue: it does not run.
        self._drop_task(node)
        self._print_line("…", node.name, how, "dim")

    def waiting(self, node: Node, holder: str) -> None:
        """Print who holds the stage's lock."""
        self._print_line("…", node.name, f"waits: another run is running it ({holder})", "yellow")

    def transfer(self, message: str) -> None:
        """Print an upload or download as a dim line."""
        self.console.print(f"[dim]⇅ {escape(printable(redact(message)))}[/]")

    def warning(self, message: str) -> None:
        """Print a warning in yellow."""
        self.console.print(f"[yellow]! {escape(printable(redact(message)))}[/]")


def _headline(stage: Stage, artifact: Artifact) -> str:
    """Return the result of a finished stage in a few numbers; absent metrics are skipped.

    A stage that has no headline shows its first numbers. An evaluation adds a score for each system.
    """
    metrics = artifact.record.get("metrics") or {}
    labels = stage.headline
    if labels is None:
        names = [name for name, value in metrics.items() if isinstance(value, (int, float))]
        labels = {name: name for name in names[:MAX_NUMBERS]}
    parts = [f"{label} {_short(metrics[name])}" for name, label in labels.items() if metrics.get(name) is not None]
    if artifact.kind == Kind.SCORECARD:
        from align.config.stages.evaluate import PROMPT_METRICS

        for policy, values in metrics.get("values", {}).items():
            # The first program's metric, which is called what its function is called, else the reward model's.
            totals = [name for name in values if "." not in name]
            programs = [name for name in totals if name not in PROMPT_METRICS]
            score = values.get(programs[0] if programs else "reward")
            if score is not None:
                parts.append(f"{policy} {_short(score)}")
            else:
                numbers = [(name, value) for name, value in values.items() if isinstance(value, (int, float))]
                parts += [f"{policy} {name} {_short(value)}" for name, value in numbers[:1]]
    return "  ".join([*parts, *metrics.get("score_reasons", ())])


def _earlier_attempts(record: dict[str, Any]) -> str:
    """Return how much of a resumed stage's time belongs to attempts before the last attempt; empty for one attempt."""
    *earlier, _ = record.get("attempts") or [0.0]
    if not earlier:
        return ""
    count = "an earlier attempt" if len(earlier) == 1 else f"{len(earlier)} earlier attempts"
    return f"  ({duration(sum(earlier))} of the time in {count})"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
