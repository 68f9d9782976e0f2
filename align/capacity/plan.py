"""A pipeline's stages on given hardware: which rows they have, which ways they could run. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from align.capacity.choosing import Option, options, remedies
from align.capacity.estimate import estimator_of, input_models
from align.capacity.hardware import Hardware
from align.capacity.inference import Inference, Rows
from align.capacity.job import Job
from align.capacity.serving import Serving, notes, servings
from align.capacity.serving import remedies as serving_remedies
from align.capacity.strategies import Strategy, of_launch
from align.config.launch import LaunchConfig
from align.config.validation import suggest, validate_plain
from align.errors import UserError
from align.models.architecture import Architecture, UnknownArchitecture
from align.pipeline.pipeline import Node, Pipeline
from align.store.store import Store

ROWS_SHOWN = 1000
"""Rows that time and cost are given for where a stage's data is not there yet."""
COUNTED = ("train_rows", "train_pairs", "rows")
"""What a data artifact's record calls the number of its rows."""


@dataclass(frozen=True)
class StagePlan:
    """One stage; ``unknown`` says why nothing is known of it, and the rest is empty then."""

    name: str
    kind: str
    job: Job | None = None
    """Of a stage that trains."""
    asked: Inference | None = None
    """Of one that samples or scores; it has either."""
    options: tuple[Option | Serving, ...] = ()
    """Those that fit first, the fastest of them at the head."""
    rows: int | None = None
    """Rows learned in the whole stage, epochs included, or prompts; None where its data is not there yet."""
    used: Hardware | None = None
    """What of the hardware the stage runs on: all of it, unless ``runtime.launch`` asks for less."""
    given: Strategy | None = None
    """The way that ``runtime.launch`` asks for; no other is tried then."""
    unknown: str = ""
    remedies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Option | Serving | None:
        """The cheapest way that fits."""
        return self.options[0] if self.options and not self.options[0].why_not else None

    def cost(self, hardware: Hardware) -> float | None:
        """US dollars of the best way; None where the price or the time is not known."""
        if self.best is None or self.best.time is None or hardware.device.price is None:
            return None
        return self.best.time.seconds / 3600 * hardware.devices * hardware.device.price

    def to_json(self, hardware: Hardware) -> dict[str, Any]:
        """Everything, in bytes and seconds."""
        known: dict[str, Any] = {"stage": self.name, "kind": self.kind}
        if self.unknown:
            return known | {"unknown": self.unknown}
        if self.asked is not None:
            known |= {"elsewhere": self.asked.elsewhere or None}
            known |= {"parameters": max((model.parameters for model in self.asked.models), default=None)}
        elif self.job is not None:
            known |= {"parameters": self.job.model.parameters}
        return known | {
            "rows": self.rows,
            "time_is_for_rows": (self.asked.rows if self.asked else self.rows) or ROWS_SHOWN,
            "dollars": self.cost(hardware),
            "options": [option.to_json() for option in self.options],
            "remedies": list(self.remedies),
            "notes": list(self.notes),
        }


def plan_hardware(
    pipeline: Pipeline,
    store: Store,
    hardware: Hardware,
    rows: int | None = None,
    fill: float = 1.0,
    configs: dict[str, Architecture] | None = None,
) -> list[StagePlan]:
    """Every stage that trains, samples or scores, in order.

    ``rows`` are those of data that is not there yet, ``fill`` the mean length of rows as a share of the greatest.
    ``configs`` are architectures of ``model`` stages whose own ``config.json`` is not on this machine, by stage.
    """
    found = []
    for node in pipeline:
        estimator = estimator_of(node.stage)
        if estimator is None:
            continue
        try:
            models = input_models(pipeline, node, store, configs)
            plan = _training if hasattr(estimator, "job") else _serving
            found.append(plan(pipeline, node, store, hardware, models, rows, fill))
        except UnknownArchitecture as error:
            found.append(StagePlan(node.name, node.stage.kind, unknown=str(error)))
    return found


Models = dict[str, list[Architecture]]
Made = TypeVar("Made")


def _training(
    pipeline: Pipeline, node: Node, store: Store, hardware: Hardware, models: Models, rows: int | None, fill: float
) -> StagePlan:
    runtime = pipeline.runtimes[node.name]
    used = _narrowed(pipeline, node, hardware)
    estimator: Any = estimator_of(node.stage)
    job: Job = estimator.job(node.config, models, runtime)
    counted = _rows_of_data(pipeline, node, store)
    learned = job.rows(rows if counted is None else counted)
    asked = runtime.launch != LaunchConfig()
    given = of_launch(runtime.launch, used.devices, job.checkpointing) if asked else None
    ways = options(job, used, learned or ROWS_SHOWN, fill, given)
    found = StagePlan(node.name, node.stage.kind, job, None, tuple(ways), learned, used, given, notes=job.notes)
    if not ways[0].why_not:
        return found
    others = _others(node, LESS_TO_LEARN, lambda config: estimator.job(config, models, runtime))
    return replace(found, remedies=tuple(remedies(job, used, ways, others)))


def _serving(
    pipeline: Pipeline, node: Node, store: Store, hardware: Hardware, models: Models, rows: int | None, fill: float
) -> StagePlan:
    runtime = pipeline.runtimes[node.name]
    counted = _rows_of_inputs(pipeline, node, store, rows or ROWS_SHOWN)
    estimator: Any = estimator_of(node.stage)
    asked: Inference = estimator.inference(node.config, models, counted)
    known = asked.rows if asked.known or rows is not None else None
    ways = servings(asked, runtime, hardware, fill) if asked.lots or asked.readings else []
    found = StagePlan(node.name, node.stage.kind, None, asked, tuple(ways), known, hardware)
    if ways and ways[0].why_not:
        others = _others(node, {}, lambda config: estimator.inference(config, models, counted))
        found = replace(found, remedies=tuple(serving_remedies(asked, runtime, hardware, others)))
    best = ways[0] if ways and not ways[0].why_not else None
    return replace(found, notes=tuple(notes(asked, runtime, hardware, best)))


def refuse_what_fits_nowhere(pipeline: Pipeline, plans: list[StagePlan], hardware: Hardware) -> None:
    """``UserError`` with the remedies if a stage fits in none of its ways."""
    lines = []
    for plan in plans:
        if plan.options and plan.best is None:
            # of ways to sample those whose engine fits at least, where what is scored afterwards does not
            least = min(plan.options, key=lambda one: (isinstance(one, Serving) and not one.largest, one.peak))
            lines.append(
                f"{pipeline.where}: stages.{plan.name} fits on {hardware.label} in no way; nearest is "
                f"{least.label}: {least.why_not}. "
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


LESS_TO_LEARN = {f"tuning={{method: {name}}}": {"tuning": {"method": name}} for name in ("lora", "qlora")}
"""Settings of a stage that trains which need less, by how they are written."""
LENGTHS = ("max_length", "max_prompt_tokens", "max_context")


def _others(node: Node, settings: dict[str, dict[str, Any]], make: Callable[[Any], Made]) -> dict[str, Made]:
    """What ``make`` makes of the stage with settings that need less, by what to write on the command line.

    Settings that it cannot have are left out.
    """
    place, config = f"stages.{node.name}", node.config
    wanted = {f"--set '{place}.{words}'": changes for words, changes in settings.items()}
    for field in LENGTHS:
        if hasattr(config, field):
            half = getattr(config, field) // 2
            wanted[f"--set {place}.{field}={half}"] = {field: half}
    found = {}
    for words, changes in wanted.items():
        try:
            found[words] = make(validate_plain(type(config), config.model_dump(mode="json") | changes))
        except (ValueError, UnknownArchitecture):
            continue
    return found


def _rows_of_data(pipeline: Pipeline, node: Node, store: Store) -> int | None:
    """Training rows of the stage's data, from its record; None where it is not finished."""
    name = node.inputs.get("data")
    if not isinstance(name, str):
        return None
    data = pipeline.nodes[name]
    artifact = store.find_intact(data.stage.kind, data.key, name)
    metrics = {} if artifact is None else artifact.record.get("metrics") or {}
    return next((int(metrics[field]) for field in COUNTED if metrics.get(field)), None)


def _rows_of_inputs(pipeline: Pipeline, node: Node, store: Store, stand_in: int) -> dict[str, Rows]:
    """Rows of both splits of every data that the stage names, by the field; ``stand_in`` where they are not known."""
    found = {}
    for field, name in node.inputs.items():
        if not isinstance(name, str):
            continue
        data = pipeline.nodes[name]
        artifact = store.find_intact(data.stage.kind, data.key, name)
        metrics = {} if artifact is None else artifact.record.get("metrics") or {}
        counts = {
            split: next((int(metrics[key]) for key in (f"{split}_rows", f"{split}_pairs") if key in metrics), None)
            for split in ("train", "test")
        }
        found[field] = Rows(**counts, stand_in=stand_in)
    return found
