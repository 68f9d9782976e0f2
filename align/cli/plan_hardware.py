"""The tables of ``align plan PIPELINE --hardware 8xh100`` and ``--memory``: how each stage fits, and why not."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.cli.parser import align_columns, print_json
from align.errors import UserError, printable

if TYPE_CHECKING:
    from align.capacity.hardware import Hardware, Way
    from align.capacity.memory import Estimate
    from align.capacity.plan import StagePlan
    from align.models.compute.architecture import Architecture
    from align.pipeline.pipeline import Pipeline
    from align.store.store import Store

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
MAX_SHOWN = 5
"""Ways of a stage that fit and are shown."""
MIB = 2**20
GIB = 2**30


# ---- align plan --hardware ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan`` about hardware."""
    parser.add_argument("--hardware", metavar="HARDWARE", help="8xh100, 1xa100-40, 4x8xh100, cpu: how each stage fits")
    parser.add_argument(
        "--model-config",
        action="append",
        default=[],
        metavar="STAGE=FILE",
        dest="model_config",
        help="config.json of a model stage's model that is not on this machine",
    )


def run(options: argparse.Namespace, pipeline: Pipeline, store: Store) -> int:
    """Print the plan; raise ``UserError`` after it if a stage fits in no way."""
    from align.capacity.hardware import parse_hardware
    from align.capacity.plan import plan_hardware

    hardware = parse_hardware(options.hardware)
    plans = plan_hardware(pipeline, store, hardware, read_configs(pipeline, options.model_config))
    if options.json:
        print_json(
            {
                "hardware": hardware.label,
                "devices": hardware.devices,
                "device": vars(hardware.device),
                "stages": [plan.to_json() for plan in plans],
            }
        )
    else:
        print("\n".join(printable(line) for line in hardware_lines(plans, hardware)))
    # The table comes first: it shows why a stage does not fit.
    refuse_what_fits_nowhere(pipeline, plans, hardware)
    return 0


def refuse_what_fits_nowhere(pipeline: Pipeline, plans: Sequence[StagePlan], hardware: Hardware) -> None:
    """Raise ``UserError`` with the remedies if a stage fits in none of its ways."""
    from align.capacity.sharding import TrainingWay

    lines = []
    for plan in plans:
        if not plan.ways or plan.best is not None:
            continue
        nearest = plan.ways[0]
        remedy = "Use a smaller model."
        if plan.remedies:
            remedy = f"What does: {'; or '.join(plan.remedies)}."
        elif not isinstance(nearest, TrainingWay):
            remedy = "Use a smaller model, or servers with tensor_parallel (runtime.rollouts), which are not counted."
        lines.append(
            f"{pipeline.where}: stages.{plan.name} fits on {hardware.label} in no way; nearest is {nearest.label}: "
            f"{nearest.obstacle}. {remedy} {plan.useless}".rstrip()
        )
    if lines:
        raise UserError("\n".join(lines))


def read_configs(pipeline: Pipeline, texts: list[str]) -> dict[str, Architecture]:
    """Parse ``STAGE=config.json``; raise ``UserError`` for an unknown stage or file."""
    from align.config.validation import suggest
    from align.models.compute.architecture import UnknownArchitecture
    from align.models.compute.model_types import read_architecture

    architectures = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals:
            raise UserError(f"--model-config {text}: expected STAGE=FILE, such as model=mistral-7b/config.json.")
        if name not in pipeline.nodes:
            raise UserError(f"--model-config {text}: there is no stage '{name}'.{suggest(name, pipeline.nodes)}")
        try:
            architectures[name] = read_architecture(Path(path))
        except UnknownArchitecture as error:
            raise UserError(f"--model-config {text}: {error}.") from None
    return architectures


def refuse_without_hardware(options: argparse.Namespace) -> None:
    """Raise ``UserError`` for an option that would be ignored."""
    if options.model_config:
        raise UserError("--model-config goes with --hardware, such as --hardware 8xh100.")


def hardware_lines(plans: Sequence[StagePlan], hardware: Hardware) -> list[str]:
    """Return every line of the output."""
    result = [f"{hardware.label}: {hardware.device.memory / GIB:.1f} GiB each"]
    for plan in plans:
        result += ["", *_stage_lines(plan, hardware)]
    return result


def _stage_lines(plan: StagePlan, hardware: Hardware) -> list[str]:
    if plan.unknown:
        return [f"{plan.name}: not known: {plan.unknown}; or give one with --model-config STAGE=FILE."]
    notes = [f"  {note}" for note in plan.notes]
    if not plan.ways:
        return [_heading(plan), *notes]
    fitting = [way for way in plan.ways if way.fits]
    result = [_heading(plan)]
    if plan.best is not None:
        result.append(f"  {describe_fit(plan, hardware)}")
    if fitting:
        # Ways that fit are a table; each other way follows with its obstacle.
        result += [f"  {line}" for line in _table(plan, fitting[:MAX_SHOWN])]
    result += [f"     {way.label}: {way.obstacle}" for way in plan.ways if not way.fits]
    if len(fitting) > MAX_SHOWN:
        result.append(f"     {len(fitting) - MAX_SHOWN} more ways fit (--json has them)")
    return result + _settings(plan, hardware) + notes


def _heading(plan: StagePlan) -> str:
    """Return the stage with its size and its counted load."""
    from align.capacity.sharding import Job

    load = plan.load
    assert load is not None
    if isinstance(load, Job):
        work = f"{load.tuning.label}, {load.batch} {load.row} a step"
        sizes = [load.model.parameters]
    elif load.models:
        names = [part.name for part in load.sampling] + [part.name for part in load.scoring]
        work = ", ".join(dict.fromkeys(names))
        sizes = sorted({model.parameters for model in load.models})
    else:
        servers = f"{load.external}; " if load.external else ""
        return f"{plan.name}: {servers}no memory of it is counted."
    parameters = " and ".join(f"{size / 1e6:,.1f}" for size in sizes)
    return f"{plan.name}: {parameters} million parameters, {work}, GiB of a device at its peak"


def describe_fit(plan: StagePlan, hardware: Hardware) -> str:
    """Return the whole setting of a stage that fits, with its memory and its speed: ``fits: 19.8 of 22.3 GiB; …``."""
    from align.capacity.sampling import SamplingWay
    from align.capacity.sharding import REACHED, Job, TrainingWay, tokens_per_second

    best, job, device = plan.best, plan.load, hardware.device
    assert best is not None
    usable = (device.usable + device.context) / GIB
    memory = f"fits: {best.peak / GIB:.1f} of {usable:.1f} GiB"
    if isinstance(best, SamplingWay):
        return f"{memory}; {best.label}, {best.batch} at once" if best.batch else f"{memory}; {best.label}"
    assert isinstance(best, TrainingWay) and isinstance(job, Job)
    base = "4-bit" if job.tuning.method == "qlora" else job.tuning.base_type(job.precision)
    words = [job.tuning.label, f"{base} {'weights' if job.tuning.trains_all else 'base'}"]
    words += ["recomputation"] if best.strategy.checkpointing else []
    words += [f"micro-batch {best.batch}", *(f"{part} in host memory" for part in best.strategy.host)]
    parts = [memory, ", ".join(words)]
    speed = tokens_per_second(job, best, device)
    # Sampling, which is slower, has no such estimate.
    if speed and "engine" not in best.parts and job.row != "responses":
        place = "a card" if hardware.devices > 1 else "the card"
        parts.append(
            f"about {float(f'{speed:.2g}'):,.0f} tokens/s if {place} reaches {REACHED:.0%} of its peak (not measured)"
        )
    return "; ".join(parts)


def _table(plan: StagePlan, ways: Sequence[Way]) -> list[str]:
    """Return the aligned table of ways, with only the columns that some way of the stage needs."""
    from align.capacity.sharding import TrainingWay

    parts = [name for name in COLUMNS if any(way.parts.get(name) or name in way.not_counted for way in plan.ways)]
    batch = "micro-batch" if isinstance(plan.ways[0], TrainingWay) else "at once"
    headings = [COLUMNS[name] for name in parts]
    rows = [["", "way", batch, "largest", *headings, "peak"]]
    for way in ways:
        amounts = [_amount(way, name) for name in parts]
        star = "*" if way is plan.best else ""
        rows.append(
            [star, way.label, str(way.batch or "-"), str(way.largest or "-"), *amounts, f"{way.peak / GIB:.2f}"]
        )
    return [line.rstrip() for line in align_columns(rows, text_columns=2)]


def _amount(way: Way, part: str) -> str:
    if part in way.not_counted:
        return "not counted"
    return f"{way.parts[part] / GIB:.2f}" if way.parts.get(part) else "-"


def _settings(plan: StagePlan, hardware: Hardware) -> list[str]:
    """Return the settings of the best way that differ from the run's own."""
    from align.capacity.sampling import SamplingWay
    from align.capacity.sharding import Job, TrainingWay

    best = plan.best
    result: list[str] = []
    if best is None or plan.setup is None:
        return result
    devices = plan.setup.hardware.devices
    if plan.setup.requested is not None:
        result.append(f"  runtime.launch asks for this way, on {devices} of {hardware.devices} devices")
    job = plan.load
    if isinstance(best, TrainingWay) and isinstance(job, Job):
        if best.not_counted:
            result.append(
                f"  the activations of {job.model.model_type} with {job.tuning.label} have no rule: the peak lacks "
                "them, and the largest micro-batch is not known"
            )
        # A run finds settings that are `auto` by itself.
        if best.strategy.checkpointing and plan.setup.config.gradient_checkpointing is False:
            result.append("  the stage has gradient_checkpointing: false; set true or auto")
        fixed = plan.setup.config.micro_batch_size
        if fixed != "auto" and best.batch != fixed:
            result.append(f"  the stage has micro_batch_size: {fixed}; set {best.batch} or auto")
    elif isinstance(best, SamplingWay) and best.batch < best.wanted:
        # The engine fits, but not with all sequences that the settings ask for at once.
        remedy = "vLLM queues the others"
        if best.engine == "transformers":
            remedy = f"runtime.engine.batch_size: {best.batch}"
        result.append(f"  {best.wanted} at once do not fit: {remedy}")
    return result


# ---- align plan --memory ----


def print_memory(estimates: Mapping[str, Estimate | str], width: int | None) -> None:
    """Print the memory of each stage, for a terminal of ``width`` columns or for a file."""
    for name, estimate in estimates.items():
        print("", *memory_lines(name, estimate, width), sep="\n")


def memory_lines(name: str, estimate: Estimate | str, width: int | None = None) -> list[str]:
    """Return a table of the memory of a stage's choices, the chosen one marked.

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
        # A terminal would break the lines, so each choice is a column.
        table = align_columns([list(column) for column in zip(*rows, strict=True)], text_columns=1)
        notes = [line for note in notes for line in textwrap.wrap(note, width - 2)]
    head = f"{name}: memory of a process in {label}, counted for {estimate.parameters / 1e6:,.1f} million parameters"
    return [head, *(f"  {line}" for line in [*table, *notes])]
