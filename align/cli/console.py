"""What a run looks like in a terminal: one line per stage. Plain and short when nobody watches. Never imports torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from align.errors import printable as printable  # part of what a console does, and imported from here
from align.errors import redact
from align.pipeline.pipeline import Node
from align.runner.listener import Listener
from align.store.artifacts import Artifact

if TYPE_CHECKING:
    from align.capacity.memory import Estimate

SHOWN = ("loss", "score", "gold", "accuracy", "kl")
"""Values a stage may show beside its bar, in this order."""


def duration(seconds: float) -> str:
    """``42s``, ``3m 05s``, ``2h 10m``."""
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
        self.started: dict[str, float] = {}
        self.first: dict[str, dict[str, Any]] = {}
        self.progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=False,
        )
        self.tasks: dict[str, TaskID] = {}
        """Bars by stage; on a cluster several stages run at once."""

    def __enter__(self) -> ConsoleListener:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.progress.stop()

    def _say(self, mark: str, name: str, text: str, style: str = "") -> None:
        line = f"{mark} {name:<{self.width}}  {escape(printable(redact(text)))}"
        self.console.print(f"[{style}]{line}[/]" if style else line, soft_wrap=True)

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        """One dim line."""
        self._say("·", node.name, f"cached  {_headline(artifact)}", "dim")

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        """A bar in a terminal, a line elsewhere."""
        self.started[node.name] = time.time()
        self.first.pop(node.name, None)
        self._drop_task(node)
        text = "resumes" if resumed else "starts"
        if self.live:
            self.tasks[node.name] = self.progress.add_task(f"{node.name:<{self.width}}", total=None, status=text)
        else:
            self._say("▸", node.name, text)

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        """Move the bar; print warnings and notes."""
        if event.get("event") == "warning":
            self._say("!", node.name, str(event.get("message")), "yellow")
        elif event.get("event") == "note":
            self._say("·", node.name, str(event.get("message")))
        elif event.get("event") == "progress" and node.name in self.tasks:
            first = self.first.setdefault(node.name, event)
            self.progress.update(
                self.tasks[node.name], total=event["total"], completed=event["done"],
                status=escape(self._status(event, first)),
            )  # fmt: skip

    def _status(self, event: dict[str, Any], first: dict[str, Any]) -> str:
        """``12/40 steps · 310 tok/s · loss 1.23 · 2m 10s left``; rates count from this attempt's first event."""
        parts = [f"{event['done']:g}/{event['total']:g} {event.get('unit', '')}"]
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
        """Time, memory and headline numbers."""
        self._drop_task(node)
        record = artifact.record
        memory = (record.get("peak_memory_bytes") or 0) / 2**30
        self._say(
            "✓", node.name, f"{duration(record['seconds']):>7}  {memory:4.1f} GiB  {_headline(artifact)}", "green"
        )

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        """The message itself follows from the command line."""
        self._drop_task(node)
        started = self.started.get(node.name)
        after = "" if started is None else f" after {duration(time.time() - started)}"
        self._say("✗", node.name, f"failed{after}", "red")

    def _drop_task(self, node: Node) -> None:
        task = self.tasks.pop(node.name, None)
        if task is not None:
            self.progress.remove_task(task)

    def stage_queued(self, node: Node, how: str) -> None:
        """Where the stage is in a cluster's queue."""
        self._say("…", node.name, how, "dim")

    def waiting(self, node: Node, holder: str) -> None:
        """Say who holds the lock."""
        self._say("…", node.name, f"waits: another run is making it ({holder})", "yellow")

    def transfer(self, message: str) -> None:
        """A dim line."""
        self.console.print(f"[dim]⇅ {escape(printable(redact(message)))}[/]")

    def warning(self, message: str) -> None:
        """A line in yellow."""
        self.console.print(f"[yellow]! {escape(printable(redact(message)))}[/]")


def _headline(artifact: Artifact) -> str:
    """What a finished stage came to, in a few numbers; a metric that is absent is left out."""
    metrics = artifact.record.get("metrics") or {}
    wanted = HEADLINES.get(artifact.record["kind"])
    if wanted is None:
        wanted = {name: name for name, value in metrics.items() if isinstance(value, (int, float))}
        wanted = dict(list(wanted.items())[:4])
    parts = [f"{label} {_short(metrics[name])}" for name, label in wanted.items() if metrics.get(name) is not None]
    if artifact.record["kind"] == "evaluate":
        for policy, values in metrics.get("values", {}).items():
            if "gold" in values or "reward" in values:
                parts.append(f"{policy} {_short(values.get('gold', values.get('reward')))}")
    return "  ".join(parts)


MEMORY_COLUMNS = {
    "weights": "policy", "gradients": "grads", "optimizer": "AdamW", "reference": "ref", "critic": "critic's",
    "reward": "reward", "copies": "bf16", "logits": "logits", "engine": "engine", "kv_cache": "KV", "total": "in all",
}  # fmt: skip
"""What ``align plan --memory`` shows of an ``align.capacity.memory.Memory``, with its headings."""


def memory_lines(name: str, found: Estimate | str) -> list[str]:
    """A table of what a stage's choices cost, the chosen one marked; or one line that says why it is not known."""
    if isinstance(found, str):
        return [f"{name}: memory not known: {printable(found)}."]
    unit, label = (2**30, "GiB") if found.choices[0].memory.total >= 2**28 else (2**20, "MiB")
    columns = {
        field: heading
        for field, heading in MEMORY_COLUMNS.items()
        if any(getattr(choice.memory, field) for choice in found.choices)
    }
    table = [["", *found.choices[0].settings, *columns.values(), "+ per 1k tokens"]]
    for choice in found.choices:
        amounts = [getattr(choice.memory, field) for field in columns]
        tokens = choice.memory.activations
        last = "not known" if tokens is None else f"{1000 * tokens / unit:.2f}"
        numbers = [f"{amount / unit:.2f}" if amount else "-" for amount in amounts]
        table.append(["*" if choice.chosen else "", *choice.settings.values(), *numbers, last])
    words = 1 + len(found.choices[0].settings)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" if at < words else f"{cell:>{width}}"
                  for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]  # fmt: skip
    head = f"{name}: memory of a process in {label}, counted for {found.parameters / 1e6:,.1f} million parameters"
    return [head, *(f"  {line}" for line in [*lines, *found.notes])]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


HEADLINES: dict[str, dict[str, str]] = {
    "model": {"parameters": "parameters", "architecture": ""},
    "data": {"train_rows": "train", "test_rows": "test"},
    "sft": {"test_loss_before": "held-out loss", "test_loss_after": "→"},
    "sample": {"train_pairs": "pairs", "train_mean_score": "mean score", "engine": "engine"},
    "reward": {"test_accuracy_after": "held-out accuracy", "test_accuracy_true_after": "on true labels"},
    **{
        kind: {"test_accuracy_after": "held-out accuracy", "test_margin_after": "margin"}
        for kind in ("dpo", "kto", "orpo", "cpo", "simpo")
    },
    "ppo": {"score_first": "score", "score_last": "→", "kl_last": "KL", "engine": "engine"},
    "grpo": {"score_first": "score", "score_last": "→", "kl_last": "KL", "engine": "engine"},
    "rloo": {"score_first": "score", "score_last": "→", "kl_last": "KL", "engine": "engine"},
    "online_dpo": {"score_first": "score", "score_last": "→", "kl_last": "KL", "engine": "engine"},
    "rejection": {"score_first": "score", "score_last": "→", "kl_last": "KL", "engine": "engine"},
    "distill": {"test_divergence_before": "held-out nats from the teacher", "test_divergence_after": "→"},
    "evaluate": {"reward_accuracy": "RM accuracy"},
    "report": {"stages": "stages"},
}
"""Metrics that a stage's closing line shows, with their labels."""
