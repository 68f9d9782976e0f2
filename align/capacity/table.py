"""What ``align plan --hardware`` prints: a table of ways for each stage. Never imports torch."""

from __future__ import annotations

from align.capacity.choosing import Option
from align.capacity.hardware import GIB, PRICES_FROM, Hardware
from align.capacity.plan import ROWS_SHOWN, StagePlan
from align.capacity.serving import Serving

COLUMNS = {
    "weights": "weights", "gradients": "grads", "optimizer": "AdamW", "activations": "acts", "logits": "logits",
    "copies": "bf16", "reference": "ref", "critic": "critic", "reward": "reward", "engine": "engine",
    "kv_cache": "KV", "file": "file", "saving": "saving", "buffers": "buffers", "context": "driver",
}  # fmt: skip
"""Parts of a device's memory, with their headings."""
MOST_SHOWN = 5
"""Ways of a stage that fit and are shown."""


def lines(plans: list[StagePlan], hardware: Hardware, fill: float) -> list[str]:
    """All that is printed."""
    device = hardware.device
    price = "no price known, give --price" if device.price is None else f"{device.price:g} dollars an hour each"
    found = [f"{hardware.label}: {device.memory / GIB:.1f} GiB each, {price}"]
    for plan in plans:
        found += ["", *_stage(plan, hardware, fill)]
    total = [plan.cost(hardware) for plan in plans]
    known = [cost for cost in total if cost is not None]
    if known and device.price:
        but = ", but for what is not counted" * any(plan.asked is not None and plan.asked.partly for plan in plans)
        found += ["", f"all of these stages{but}: {sum(known):,.2f} dollars. Prices: {PRICES_FROM}."]
    return found


def _stage(plan: StagePlan, hardware: Hardware, fill: float) -> list[str]:
    if plan.unknown:
        return [f"{plan.name}: not known: {plan.unknown}; or give one with --model-config STAGE=FILE."]
    head = _head(plan)
    if not plan.options:
        return [head, *(f"  {note}" for note in plan.notes)]
    at_once = "micro-batch" if plan.job is not None else "at once"
    shown = [name for name in COLUMNS if any(option.parts.get(name) for option in plan.options)]
    every = [option for option in plan.options if not option.why_not]
    fitting = every[:MOST_SHOWN]
    table = [["", "way", at_once, "largest", *(COLUMNS[name] for name in shown), "peak", "time", "dollars"]]
    table += [_row(option, shown, hardware, option is plan.best) for option in fitting]
    result = [head, *(f"  {line}" for line in _aligned(table))] if fitting else [head]
    result += [f"     {option.label}: {option.why_not}" for option in plan.options if option.why_not]
    if len(every) > MOST_SHOWN:
        result.append(f"     {len(every) - MOST_SHOWN} slower ways fit too (--json has them)")
    return result + _amounts(plan, hardware, fill) + [f"  {note}" for note in plan.notes]


def _head(plan: StagePlan) -> str:
    """The stage, and what is counted of it."""
    job, asked = plan.job, plan.asked
    if job is not None:
        what = f"{job.tuning.label}, {job.batch} {job.row} a step"
        parameters = f"{job.model.parameters / 1e6:,.1f} million parameters"
    elif asked is not None and asked.models:
        names = dict.fromkeys([*(lot.who for lot in asked.lots), *(reading.who for reading in asked.readings)])
        what = f"{asked.rows:,} {asked.row} (" * bool(asked.rows) + ", ".join(names) + ")" * bool(asked.rows)
        sizes = sorted({model.parameters for model in asked.models})
        parameters = " and ".join(f"{size / 1e6:,.1f}" for size in sizes) + " million parameters"
    else:
        elsewhere = f"{asked.elsewhere}; " if asked is not None and asked.elsewhere else ""
        return f"{plan.name}: {elsewhere}nothing of it is counted."
    return f"{plan.name}: {parameters}, {what}, GiB of a device when it is fullest"


def _amounts(plan: StagePlan, hardware: Hardware, fill: float) -> list[str]:
    """Rows, tokens, operations of the best way, and what to set for it."""
    best = plan.best
    if best is None or best.time is None:
        return []
    length = "all of the greatest length (--fill)" if fill == 1 else f"of {fill:g} of the greatest length"
    if isinstance(best, Serving):
        assert plan.asked is not None
        rows, row = plan.asked.rows, plan.asked.row
        tokens = f"{_count(best.time.sampled)} tokens sampled, {_count(best.time.read)} read"
    else:
        assert plan.job is not None
        rows, row = plan.rows or ROWS_SHOWN, plan.job.row
        sampled = f", {_count(best.time.sampled)} sampled" if best.time.sampled else ""
        tokens = f"{_count(best.time.tokens)} tokens learned{sampled}"
    there = plan.rows is not None if isinstance(best, Serving) else plan.rows
    unknown = "" if there else f", time for {rows:,} of them, since its data is not there yet (--rows)"
    found = [f"  {rows:,} {row}{unknown}, {length}: {tokens}, {best.time.flops:.2g} operations"]
    if isinstance(best, Serving):
        return found + _settings(best, plan)
    if plan.given is not None and plan.used is not None:
        found.append(f"  runtime.launch asks for this way, on {plan.used.devices} of {hardware.devices} devices")
    if plan.job is not None and best.strategy.checkpointing and not plan.job.checkpointing:
        found.append(f"  checkpointing is a setting of the stage: {plan.job.checkpointing_field}: true")
    return found


def _settings(best: Serving, plan: StagePlan) -> list[str]:
    """What is to be written for a way of sampling that is not what the run would do."""
    found = []
    if best.way.setting and not best.asked_for:
        found.append(f"  servers are a setting of the run: {best.way.setting}")
    if 0 < best.at_once < best.wanted and best.way.engine == "transformers":
        found.append(f"  {best.wanted} at once do not fit: runtime.engine.batch_size: {best.at_once}")
    elif 0 < best.at_once < best.wanted:
        found.append(f"  {best.wanted} at once do not fit: vLLM lets the others wait")
    return found


def _row(option: Option | Serving, shown: list[str], hardware: Hardware, best: bool) -> list[str]:
    parts = [f"{option.parts[name] / GIB:.2f}" if option.parts.get(name) else "-" for name in shown]
    seconds = option.time.seconds if option.time is not None else None
    price = hardware.device.price
    dollars = "-" if seconds is None or not price else f"{seconds / 3600 * hardware.devices * price:,.2f}"
    return [
        "*" if best else "",
        option.label,
        *_sizes(option),
        *parts,
        f"{option.peak / GIB:.2f}",
        "-" if seconds is None else _duration(seconds),
        dollars,
    ]


def _sizes(option: Option | Serving) -> list[str]:
    """Rows of a micro-batch, or sequences at once; and how many there could be."""
    size = option.at_once if isinstance(option, Serving) else option.micro_batch
    return [str(size or "-"), str(option.largest or "-")]


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" if at < 2 else f"{cell:>{width}}"
                  for at, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    ]  # fmt: skip


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{seconds / 60:.0f}m"
    return f"{seconds / 3600:.1f}h"


def _count(number: float) -> str:
    for limit, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f}"
