"""What ``align plan --hardware`` prints: a table of ways for each stage. Never imports torch."""

from __future__ import annotations

from align.capacity.choosing import Option
from align.capacity.hardware import GIB, PRICES_FROM, Hardware
from align.capacity.plan import ROWS_SHOWN, StagePlan

COLUMNS = {
    "weights": "weights", "gradients": "grads", "optimizer": "AdamW", "activations": "acts", "logits": "logits",
    "copies": "bf16", "reference": "ref", "critic": "critic", "reward": "reward", "engine": "engine",
    "kv_cache": "KV", "saving": "saving", "buffers": "buffers", "context": "driver",
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
    total = [plan.cost(hardware) for plan in plans if plan.job is not None]
    known = [cost for cost in total if cost is not None]
    if known and device.price:
        found += ["", f"all of these stages: {sum(known):,.2f} dollars. Prices: {PRICES_FROM}."]
    return found


def _stage(plan: StagePlan, hardware: Hardware, fill: float) -> list[str]:
    if plan.job is None:
        return [f"{plan.name}: not known: {plan.unknown}; or give one with --model-config STAGE=FILE."]
    job = plan.job
    head = (
        f"{plan.name}: {job.model.parameters / 1e6:,.1f} million parameters, {job.tuning.label}, {job.batch} {job.row} "
        f"a step, GiB of a device when it is fullest"
    )
    shown = [name for name in COLUMNS if any(option.parts.get(name) for option in plan.options)]
    every = [option for option in plan.options if not option.why_not]
    fitting = every[:MOST_SHOWN]
    table = [["", "way", "micro-batch", "largest", *(COLUMNS[name] for name in shown), "peak", "time", "dollars"]]
    table += [_row(option, shown, hardware, option is plan.best) for option in fitting]
    result = [head, *(f"  {line}" for line in _aligned(table))] if fitting else [head]
    result += [f"     {option.strategy.label}: {option.why_not}" for option in plan.options if option.why_not]
    if len(every) > MOST_SHOWN:
        result.append(f"     {len(every) - MOST_SHOWN} slower ways fit too (--json has them)")
    best = plan.best
    if best is not None and best.time is not None:
        rows = plan.rows or ROWS_SHOWN
        unknown = "" if plan.rows else f", time for {ROWS_SHOWN:,} of them, since its data is not there yet (--rows)"
        length = "all of the greatest length (--fill)" if fill == 1 else f"of {fill:g} of the greatest length"
        sampled = f", {_count(best.time.sampled)} sampled" if best.time.sampled else ""
        result.append(
            f"  {rows:,} {job.row}{unknown}, {length}: {_count(best.time.tokens)} tokens learnt{sampled}, "
            f"{best.time.flops:.2g} operations"
        )
        if plan.given is not None and plan.used is not None:
            result.append(f"  runtime.launch asks for this way, on {plan.used.devices} of {hardware.devices} devices")
        if best.strategy.checkpointing and not job.checkpointing:
            result.append(f"  checkpointing is a setting of the stage: {job.checkpointing_field}: true")
    return result + [f"  {note}" for note in job.notes]


def _row(option: Option, shown: list[str], hardware: Hardware, best: bool) -> list[str]:
    parts = [f"{option.parts[name] / GIB:.2f}" if option.parts.get(name) else "-" for name in shown]
    seconds = option.time.seconds if option.time is not None else None
    price = hardware.device.price
    dollars = "-" if seconds is None or not price else f"{seconds / 3600 * hardware.devices * price:,.2f}"
    return [
        "*" if best else "",
        option.strategy.label,
        str(option.micro_batch),
        str(option.largest),
        *parts,
        f"{option.peak / GIB:.2f}",
        "-" if seconds is None else _duration(seconds),
        dollars,
    ]


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
