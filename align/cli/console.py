"""Output of a run in a terminal: a live line per stage, or plain lines where output is not a terminal. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from align.errors import printable as printable  # re-exported for the commands
from align.errors import redact
from align.pipeline.pipeline import Node
from align.pipeline.registry import Stage
from align.runner.listener import Listener
from align.store.artifacts import Artifact, Kind

if TYPE_CHECKING:
    from align.capacity.memory import Estimate

SHOWN = ("loss", "score", "gold", "accuracy", "kl")
"""Values that a stage may show next to its bar, in this order."""
MAX_NUMBERS = 4
"""Numbers in the closing line of a stage without a headline of its own."""


def duration(seconds: float) -> str:
    """Return seconds as ``42s``, ``3m 05s`` or ``2h 10m``."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds // 60:.0f}m {seconds % 60:02.0f}s"
    return f"{seconds // 3600:.0f}h {seconds % 3600 // 60:02.0f}m"


class ConsoleListener(Listener):
    """A live line per stage in a terminal; one line at a stage's start and end elsewhere."""

    def __init__(self, pipeline_nodes: list[Node], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.live = self.console.is_terminal
        self.width = max((len(node.name) for node in pipeline_nodes), default=8)
        self.start_times: dict[str, float] = {}
        self.first_events: dict[str, dict[str, Any]] = {}
        """A stage's first progress event; rates and the time left count from it."""
        self.progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=False,
        )
        self.tasks: dict[str, TaskID] = {}
        """Progress bars by stage; on a cluster several stages run at once."""

    def __enter__(self) -> ConsoleListener:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.progress.stop()

    def _print_line(self, mark: str, name: str, text: str, style: str = "") -> None:
        line = f"{mark} {name:<{self.width}}  {escape(printable(redact(text)))}"
        self.console.print(f"[{style}]{line}[/]" if style else line, soft_wrap=True)

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        """Print a dim line with the stage's result."""
        self._print_line("·", node.name, f"cached  {_headline(node.stage, artifact)}", "dim")

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        """Add a progress bar in a terminal, print a line elsewhere."""
        self.start_times[node.name] = time.time()
        self.first_events.pop(node.name, None)
        self._drop_task(node)
        text = "resumes" if resumed else "starts"
        if self.live:
            self.tasks[node.name] = self.progress.add_task(f"{node.name:<{self.width}}", total=None, status=text)
        else:
            self._print_line("▸", node.name, text)

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        """Update the progress bar; print warnings and notes."""
        if event.get("event") == "warning":
            self._print_line("!", node.name, str(event.get("message")), "yellow")
        elif event.get("event") == "note":
            self._print_line("·", node.name, str(event.get("message")))
        elif event.get("event") == "progress" and node.name in self.tasks:
            first = self.first_events.setdefault(node.name, event)
            status = escape(self._status(event, first))
            task = self.tasks[node.name]
            self.progress.update(task, total=event["total"], completed=event["done"], status=status)

    def _status(self, event: dict[str, Any], first: dict[str, Any]) -> str:
        """Return ``12/40 steps · 310 tok/s · loss 1.23 · 2m 10s left``; rates count from this attempt's first event."""
        parts = [f"{event['done']:g}/{event['total']:g} {event.get('unit', '')}"]
        # A resumed stage starts at its checkpoint, so rates count from its first event.
        elapsed = event["time"] - first["time"]
        if event.get("tokens") is not None and elapsed > 0:
            parts.append(f"{(event['tokens'] - (first.get('tokens') or 0)) / elapsed:.0f} tok/s")
        for name in SHOWN:
            if isinstance(event.get(name), (int, float)):
                parts.append(f"{name} {event[name]:.3g}")
        done = event["done"] - first["done"]
        if done > 0 and elapsed > 0:
            parts.append(f"{duration((event['total'] - event['done']) * elapsed / done)} left")
        return " · ".join(parts)

    def stage_done(self, node: Node, artifact: Artifact) -> None:
        """Print time, peak memory and the stage's result."""
        self._drop_task(node)
        record = artifact.record
        memory = (record.get("peak_memory_bytes") or 0) / 2**30
        costs = f"{duration(record['seconds']):>7}  {memory:4.1f} GiB"
        self._print_line("✓", node.name, f"{costs}  {_headline(node.stage, artifact)}", "green")

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        """Print that the stage failed; the command prints the message itself."""
        self._drop_task(node)
        started = self.start_times.get(node.name)
        after = "" if started is None else f" after {duration(time.time() - started)}"
        self._print_line("✗", node.name, f"failed{after}", "red")

    def _drop_task(self, node: Node) -> None:
        task = self.tasks.pop(node.name, None)
        if task is not None:
            self.progress.remove_task(task)

    def stage_queued(self, node: Node, how: str) -> None:
        """Print the stage's state in a cluster's queue."""
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
    """Return the result of a finished stage in a few numbers; metrics that are absent are left out.

    A stage without a headline of its own shows its first numbers. An evaluation adds a score for each system.
    """
    metrics = artifact.record.get("metrics") or {}
    labels = stage.headline
    if labels is None:
        names = [name for name, value in metrics.items() if isinstance(value, (int, float))]
        labels = {name: name for name in names[:MAX_NUMBERS]}
    parts = [f"{label} {_short(metrics[name])}" for name, label in labels.items() if metrics.get(name) is not None]
    if artifact.kind == Kind.SCORECARD:
        for policy, values in metrics.get("values", {}).items():
            score = values.get("gold", values.get("reward"))
            if score is not None:
                parts.append(f"{policy} {_short(score)}")
    return "  ".join(parts)


MEMORY_COLUMNS = {
    "weights": "policy",
    "gradients": "grads",
    "optimizer": "AdamW",
    "reference": "ref",
    "critic": "critic's",
    "reward": "reward",
    "copies": "bf16",
    "logits": "logits",
    "engine": "engine",
    "kv_cache": "KV",
    "total": "in all",
}
"""Fields of ``align.capacity.memory.Memory`` that ``align plan --memory`` shows, with their headings."""
GIB, MIB = 2**30, 2**20


def memory_lines(name: str, estimate: Estimate | str) -> list[str]:
    """Return a table of the memory that a stage's choices take, the chosen one marked.

    A text instead of an estimate says why it is not known.
    """
    if isinstance(estimate, str):
        return [f"{name}: memory not known: {printable(estimate)}."]
    unit, label = (GIB, "GiB") if estimate.choices[0].memory.total >= GIB / 4 else (MIB, "MiB")
    columns = {
        field: heading
        for field, heading in MEMORY_COLUMNS.items()
        if any(getattr(choice.memory, field) for choice in estimate.choices)
    }
    settings = estimate.choices[0].settings
    rows = [["", *settings, *columns.values(), "+ per 1k tokens"]]
    for choice in estimate.choices:
        amounts = [getattr(choice.memory, field) for field in columns]
        numbers = [f"{amount / unit:.2f}" if amount else "-" for amount in amounts]
        activations = choice.memory.activations
        per_1k_tokens = "not known" if activations is None else f"{1000 * activations / unit:.2f}"
        rows.append(["*" if choice.chosen else "", *choice.settings.values(), *numbers, per_1k_tokens])
    lines = align_columns(rows, text_columns=1 + len(settings))
    head = f"{name}: memory of a process in {label}, counted for {estimate.parameters / 1e6:,.1f} million parameters"
    return [head, *(f"  {line}" for line in [*lines, *estimate.notes])]


def align_columns(rows: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """Return rows as lines with aligned columns: the first ``text_columns`` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return lines


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
