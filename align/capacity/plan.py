"""A pipeline's stages on given hardware: which rows they have, which ways they could run. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.capacity.choosing import Option, options, remedies
from align.capacity.hardware import Hardware
from align.capacity.strategies import Strategy, of_launch
from align.errors import UserError
from align.launch import LaunchConfig
from align.models.architecture import Architecture, UnknownArchitecture
from align.models.job import Job
from align.pipeline import Node, Pipeline
from align.planning import models_of
from align.store import Store
from align.validation import suggest

ROWS_SHOWN = 1000
"""Rows that time and cost are given for where a stage's data is not there yet."""
COUNTED = ("train_rows", "train_pairs", "rows")
"""What a data artifact's record calls the number of its rows."""


@dataclass(frozen=True)
class StagePlan:
    """One stage that trains; ``unknown`` says why nothing is known of it, and the rest is empty then."""

    name: str
    kind: str
    job: Job | None = None
    options: tuple[Option, ...] = ()
    """Those that fit first, the fastest of them at the head."""
    rows: int | None = None
    """Rows learnt in the whole stage, epochs included; None where its data is not there yet."""
    used: Hardware | None = None
    """What of the hardware the stage runs on: all of it, unless ``runtime.launch`` asks for less."""
    given: Strategy | None = None
    """The way that ``runtime.launch`` asks for; no other is tried then."""
    unknown: str = ""
    remedies: tuple[str, ...] = ()

    @property
    def best(self) -> Option | None:
        """The cheapest way that fits."""
        return self.options[0] if self.options and not self.options[0].why_not else None

    def cost(self, hardware: Hardware) -> float | None:
        """US dollars of the best way; None where the price or the time is not known."""
        if self.best is None or self.best.time is None or hardware.device.price is None:
            return None
        return self.best.time.seconds / 3600 * hardware.devices * hardware.device.price

    def to_json(self, hardware: Hardware) -> dict[str, Any]:
        """Everything, in bytes and seconds."""
        if self.job is None:
            return {"stage": self.name, "kind": self.kind, "unknown": self.unknown}
        return {
            "stage": self.name,
            "kind": self.kind,
            "parameters": self.job.model.parameters,
            "rows": self.rows,
            "time_is_for_rows": self.rows or ROWS_SHOWN,
            "dollars": self.cost(hardware),
            "options": [option.to_json() for option in self.options],
            "remedies": list(self.remedies),
            "notes": list(self.job.notes),
        }


def plan_hardware(
    pipeline: Pipeline,
    store: Store,
    hardware: Hardware,
    rows: int | None = None,
    fill: float = 1.0,
    configs: dict[str, Architecture] | None = None,
) -> list[StagePlan]:
    """Every stage that trains, in order.

    ``rows`` are those of data that is not there yet, ``fill`` the mean length of rows as a share of the greatest.
    ``configs`` are architectures of ``model`` stages whose own ``config.json`` is not on this machine, by stage.
    """
    found = []
    for node in pipeline:
        if not hasattr(node.config, "job"):
            continue
        runtime = pipeline.runtimes[node.name]
        used = _narrowed(pipeline, node, hardware)
        try:
            models = models_of(pipeline, node, store, configs)
            job: Job = node.config.job(models, runtime)
            counted = _rows_of_data(pipeline, node, store)
            learnt = job.rows(rows if counted is None else counted)
            asked = runtime.launch != LaunchConfig()
            given = of_launch(runtime.launch, used.devices, job.checkpointing) if asked else None
            ways = options(job, used, learnt or ROWS_SHOWN, fill, given)
        except UnknownArchitecture as error:
            found.append(StagePlan(node.name, node.stage.kind, unknown=str(error)))
            continue
        others = {} if not ways[0].why_not else _others(pipeline, node, models)
        found.append(
            StagePlan(
                node.name,
                node.stage.kind,
                job,
                tuple(ways),
                learnt,
                used,
                given,
                remedies=tuple(remedies(job, used, ways, others)) if ways[0].why_not else (),
            )
        )
    return found


def refuse_what_fits_nowhere(pipeline: Pipeline, plans: list[StagePlan], hardware: Hardware) -> None:
    """``UserError`` with the remedies if a stage fits in none of its ways."""
    lines = []
    for plan in plans:
        if plan.job is not None and plan.best is None:
            least = min(plan.options, key=lambda one: one.peak)
            lines.append(
                f"{pipeline.where}: stages.{plan.name} fits on {hardware.label} in no way; nearest is "
                f"{least.strategy.label}: {least.why_not}. "
                + (f"What does: {'; or '.join(plan.remedies)}." if plan.remedies else "Take a smaller model.")
            )
    if lines:
        raise UserError("\n".join(lines))


def read_configs(pipeline: Pipeline, given: list[str]) -> dict[str, Architecture]:
    """``STAGE=config.json`` as given on the command line; ``UserError`` for a stage or file that is not there."""
    from align.models.architecture import read_architecture

    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            raise UserError(f"--model-config {text}: expected STAGE=FILE, such as model=mistral-7b/config.json.")
        if name not in pipeline.nodes:
            raise UserError(f"--model-config {text}: there is no stage '{name}'.{suggest(name, pipeline.nodes)}")
        try:
            found[name] = read_architecture(Path(path))
        except UnknownArchitecture as error:
            raise UserError(f"--model-config {text}: {error}.") from None
    return found


def _narrowed(pipeline: Pipeline, node: Node, hardware: Hardware) -> Hardware:
    """The devices that the stage's ``launch`` asks for; ``UserError`` where that is more than there are."""
    launch = pipeline.runtimes[node.name].launch
    if launch == LaunchConfig():
        return hardware
    per_node = hardware.per_node if launch.processes == "auto" else launch.processes
    if launch.nodes > hardware.nodes or per_node > hardware.per_node:
        raise UserError(
            f"{pipeline.where}: stages.{node.name} asks for {launch.nodes} x {per_node} processes (runtime.launch), "
            f"and --hardware {hardware.label} has {hardware.nodes} x {hardware.per_node} devices. Change one of them."
        )
    return replace(hardware, nodes=launch.nodes, per_node=per_node)


def _others(pipeline: Pipeline, node: Node, models: dict[str, list[Architecture]]) -> dict[str, Job]:
    """The stage with settings that need less, by what to write on the command line; those it cannot have left out."""
    place, config = f"stages.{node.name}", node.config
    wanted = {f"--set '{place}.tuning={{method: {name}}}'": {"tuning": {"method": name}} for name in ("lora", "qlora")}
    for field in ("max_length", "max_prompt_tokens"):
        if hasattr(config, field):
            half = getattr(config, field) // 2
            wanted[f"--set {place}.{field}={half}"] = {field: half}
    found = {}
    for words, changes in wanted.items():
        try:
            changed: Any = type(config).model_validate(config.model_dump() | changes)
            found[words] = changed.job(models, pipeline.runtimes[node.name])
        except (ValueError, UnknownArchitecture):
            continue
    return found


def _rows_of_data(pipeline: Pipeline, node: Node, store: Store) -> int | None:
    """Training rows of the stage's data, from its record; None where it is not finished."""
    name = node.inputs.get("data")
    if not isinstance(name, str):
        return None
    data = pipeline.nodes[name]
    artifact = store.find(data.stage.kind, data.key, name)
    metrics = {} if artifact is None else artifact.record.get("metrics") or {}
    return next((int(metrics[field]) for field in COUNTED if metrics.get(field)), None)
