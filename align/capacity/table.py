"""The tables that ``align plan`` prints with ``--hardware`` and with ``--memory``. Never imports torch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from align.capacity.hardware import GIB, PRICES_FROM, Hardware
from align.capacity.layouts import EngineLayout, Strategy
from align.capacity.memory import Estimate
from align.capacity.plan import ROWS_SHOWN, StagePlan
from align.capacity.timing import TimeEstimate
from align.capacity.ways import Way
from align.errors import printable

COLUMNS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "AdamW",
    "activations": "acts",
    "logits": "logits",
    "copies": "bf16",
    "reference": "ref",
    "critic": "critic",
    "reward": "reward",
    "engine": "engine",
    "user": "user",
    "kv_cache": "KV",
    "file": "file",
    "saving": "saving",
    "buffers": "buffers",
    "heap": "heap",
    "context": "driver",
}
"""Parts of a device's memory, with their headings."""
MAX_SHOWN = 5
"""Ways of a stage that fit and are shown."""
NOT_MEASURED = (
    "Times and dollars are ranges by assumed efficiencies (docs/scaling.md); nothing of them was measured on a GPU."
)


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
    "heap": "heap",
    "total": "in all",
}
"""Parts of ``align.capacity.memory.Memory`` that ``align plan --memory`` shows, with their headings."""
MIB = 2**20


def lines(plans: list[StagePlan], hardware: Hardware, fill: float) -> list[str]:
    """Return every line of the output."""
    device = hardware.device
    price = "no price known, give --price" if device.price is None else f"{device.price:g} dollars an hour each"
    result = [f"{hardware.label}: {device.memory / GIB:.1f} GiB each, {price}"]
    for plan in plans:
        result += ["", *_stage_lines(plan, hardware, fill)]
    if any(plan.best is not None and plan.best.time is not None for plan in plans):
        result += ["", NOT_MEASURED]
    costs = [cost for cost in (plan.dollars(hardware) for plan in plans) if cost is not None]
    if costs and device.price:
        is_partial = any(plan.inference is not None and plan.inference.is_partial for plan in plans)
        exception = ", but for what is not counted" if is_partial else ""
        total = _range(sum(cost[0] for cost in costs), sum(cost[2] for cost in costs))
        result.append(f"all of these stages{exception}: {total} dollars. Prices: {PRICES_FROM}.")
    return result


def _stage_lines(plan: StagePlan, hardware: Hardware, fill: float) -> list[str]:
    if plan.unknown:
        return [f"{plan.name}: not known: {plan.unknown}; or give one with --model-config STAGE=FILE."]
    notes = [f"  {note}" for note in plan.notes]
    if not plan.ways:
        return [_heading(plan), *notes]
    fitting = [way for way in plan.ways if way.fits]
    result = [_heading(plan)]
    if fitting:
        # What fits first, as a table; what does not follows with its obstacle.
        result += [f"  {line}" for line in _table(plan, fitting[:MAX_SHOWN], hardware)]
    result += [f"     {way.label}: {way.obstacle}" for way in plan.ways if not way.fits]
    if len(fitting) > MAX_SHOWN:
        result.append(f"     {len(fitting) - MAX_SHOWN} slower ways fit too (--json has them)")
    return result + _summary(plan, hardware, fill) + notes


def _heading(plan: StagePlan) -> str:
    """Return the stage with its size and what is counted of it."""
    job, inference = plan.job, plan.inference
    if job is not None:
        load = f"{job.tuning.label}, {job.batch} {job.row} a step"
        parameters = f"{job.model.parameters / 1e6:,.1f} million parameters"
    elif inference is not None and inference.models:
        names = [part.name for part in inference.sampling] + [part.name for part in inference.scoring]
        load = ", ".join(dict.fromkeys(names))
        if inference.rows:
            load = f"{inference.rows:,} {inference.row} ({load})"
        sizes = sorted({model.parameters for model in inference.models})
        parameters = " and ".join(f"{size / 1e6:,.1f}" for size in sizes) + " million parameters"
    else:
        servers = f"{inference.external}; " if inference is not None and inference.external else ""
        return f"{plan.name}: {servers}nothing of it is counted."
    return f"{plan.name}: {parameters}, {load}, GiB of a device at its peak"


def _table(plan: StagePlan, ways: list[Way], hardware: Hardware) -> list[str]:
    """Return the aligned table of ways, with only the columns that some way of the stage needs."""
    parts = [name for name in COLUMNS if any(way.parts.get(name) for way in plan.ways)]
    batch = "micro-batch" if plan.job is not None else "at once"
    headings = [COLUMNS[name] for name in parts]
    rows = [["", "way", batch, "largest", *headings, "peak", "time (estimate)", "dollars (estimate)"]]
    for way in ways:
        amounts = [f"{way.parts[name] / GIB:.2f}" if way.parts.get(name) else "-" for name in parts]
        dollars = way.dollars(hardware)
        rows.append(
            [
                "*" if way is plan.best else "",
                way.label,
                str(way.batch or "-"),
                str(way.largest or "-"),
                *amounts,
                f"{way.peak / GIB:.2f}",
                "-" if way.time is None else _duration_range(way.time),
                "-" if not dollars or not hardware.device.price else _range(dollars[0], dollars[2]),
            ]
        )
    return [line.rstrip() for line in align_columns(rows, text_columns=2)]


def _summary(plan: StagePlan, hardware: Hardware, fill: float) -> list[str]:
    """Return rows, tokens and operations of the best way, and the settings that select it."""
    best = plan.best
    if best is None or best.time is None:
        return []
    if plan.job is not None:
        rows, row, is_known = plan.rows or ROWS_SHOWN, plan.job.row, bool(plan.rows)
        sampled = f", {_count(best.time.sampled)} sampled" if best.time.sampled else ""
        tokens = f"{_count(best.time.tokens)} tokens trained on{sampled}"
    else:
        assert plan.inference is not None
        rows, row, is_known = plan.inference.rows, plan.inference.row, plan.rows is not None
        tokens = f"{_count(best.time.sampled)} tokens sampled, {_count(best.time.read)} read"
    length = "all of the greatest length (--fill)" if fill == 1 else f"of {fill:g} of the greatest length"
    unknown = "" if is_known else f", time for {rows:,} of them, since its data is not there yet (--rows)"
    summary = f"  {rows:,} {row}{unknown}, {length}: {tokens}, {best.time.flops:.2g} operations"
    return [summary, *_settings(plan, best, hardware)]


def _settings(plan: StagePlan, best: Way, hardware: Hardware) -> list[str]:
    """Return the settings of the best way that differ from what the run would do."""
    result = []
    if plan.requested is not None and plan.hardware is not None:
        devices = f"{plan.hardware.devices} of {hardware.devices} devices"
        result.append(f"  runtime.launch asks for this way, on {devices}")
    layout = best.layout
    if plan.job is not None and isinstance(layout, Strategy):
        if layout.checkpointing and not plan.job.checkpointing:
            result.append(f"  checkpointing is a setting of the stage: {plan.job.checkpointing_field}: true")
        if best.batch != plan.job.run_micro_batch((plan.hardware or hardware).devices):
            result.append(f"  the micro-batch is a setting of the stage: micro_batch_size: {best.batch}")
    elif isinstance(layout, EngineLayout):
        if layout.setting and not best.is_requested:
            result.append(f"  servers are a setting of the run: {layout.setting}")
        # The engine fits, but not with all sequences that the settings ask for at once.
        if 0 < best.batch < best.wanted:
            remedy = "vLLM queues the others"
            if layout.engine == "transformers":
                remedy = f"runtime.engine.batch_size: {best.batch}"
            result.append(f"  {best.wanted} at once do not fit: {remedy}")
    return result


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


def _duration_range(time: TimeEstimate) -> str:
    return f"{_duration(time.fastest)} - {_duration(time.slowest)}"


def _range(low: float, high: float) -> str:
    return f"{low:,.2f} - {high:,.2f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{seconds / 60:.1f}m" if seconds < 600 else f"{seconds / 60:.0f}m"
    return f"{seconds / 3600:.1f}h"


def _count(number: float) -> str:
    for limit, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f}"


# ---- align plan --memory ----


def memory_lines(name: str, estimate: Estimate | str, width: int | None = None) -> list[str]:
    """Return a table of the memory that a stage's choices take, the chosen one marked.

    A text instead of an estimate says why it is not known. A table that is wider than ``width`` columns has a column
    for each choice instead of a row, and its notes are wrapped.
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
        per_token = choice.memory.per_token
        per_1k_tokens = "not known" if per_token is None else f"{1000 * per_token / unit:.2f}"
        rows.append(["*" if choice.chosen else "", *choice.settings.values(), *numbers, per_1k_tokens])
    table = align_columns(rows, text_columns=1 + len(settings))
    notes = list(estimate.notes)
    if width is not None and max(map(len, table)) + 2 > width:
        # A terminal would break the lines: the numbers of a choice stand below each other instead.
        table = align_columns([list(column) for column in zip(*rows, strict=True)], text_columns=1)
        notes = [line for note in notes for line in textwrap.wrap(note, width - 2)]
    head = f"{name}: memory of a process in {label}, counted for {estimate.parameters / 1e6:,.1f} million parameters"
    return [head, *(f"  {line}" for line in [*table, *notes])]
