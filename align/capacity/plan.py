"""Plan of a pipeline's stages on given hardware: their rows, and the ways they could run. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from align.capacity.estimate import estimator_of, input_models
from align.capacity.hardware import Hardware
from align.capacity.inference import Inference, Rows
from align.capacity.job import Job
from align.capacity.layouts import EngineLayout, Strategy, requested_strategy
from align.capacity.sampling_ways import sampling_notes, sampling_remedies, sampling_ways
from align.capacity.training_ways import training_remedies, training_ways
from align.capacity.ways import Way
from align.config.launch import LaunchConfig
from align.config.validation import suggest, validate_plain
from align.errors import UserError
from align.models.architecture import Architecture, UnknownArchitecture, read_architecture
from align.models.compute_types import with_expected_precision
from align.pipeline.pipeline import Node, Pipeline
from align.store.artifacts import Kind
from align.store.store import Store

ROWS_SHOWN = 1000
"""Rows that time and cost are for while a stage's data is not finished."""
ROW_METRICS = ("train_rows", "train_pairs", "rows")
"""Metrics of a data artifact's record that count its training rows."""
LESS_TO_TRAIN = {f"tuning={{method: {name}}}": {"tuning": {"method": name}} for name in ("lora", "qlora")}
"""Settings of a stage that trains which need less memory, by their spelling."""
LENGTH_FIELDS = ("max_length", "max_prompt_tokens", "max_context")
"""Fields of a stage's config that a remedy may halve."""

Models = dict[str, list[Architecture]]
Load = TypeVar("Load")


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage; ``unknown`` says why there is none, and the rest is empty then."""

    name: str
    kind: str
    job: Job | None = None
    """What a stage that trains asks of devices."""
    inference: Inference | None = None
    """What a stage that samples or scores asks of them; a stage has either."""
    ways: tuple[Way, ...] = ()
    """Those that fit first, the fastest at the head."""
    rows: int | None = None
    """Rows trained on in the stage, epochs included, or prompts; None while its data is not finished."""
    hardware: Hardware | None = None
    """The devices that the stage runs on: all of them, unless ``runtime.launch`` asks for fewer."""
    requested: Strategy | None = None
    """The strategy that ``runtime.launch`` names; no other is tried then."""
    unknown: str = ""
    remedies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Way | None:
        """The cheapest way that fits."""
        return self.ways[0] if self.ways and self.ways[0].fits else None

    def dollars(self, hardware: Hardware) -> tuple[float, float, float] | None:
        """Return the cost of the best way: lowest, assumed, highest; None without a time or a price."""
        return None if self.best is None else self.best.dollars(hardware)

    def to_json(self, hardware: Hardware) -> dict[str, Any]:
        """Return everything in bytes, seconds and dollars."""
        known: dict[str, Any] = {"stage": self.name, "kind": self.kind}
        if self.unknown:
            return known | {"unknown": self.unknown}
        rows = self.rows
        if self.inference is not None:
            sizes = [model.parameters for model in self.inference.models]
            known |= {"external": self.inference.external or None, "parameters": max(sizes, default=None)}
            rows = self.inference.rows
        elif self.job is not None:
            known |= {"parameters": self.job.model.parameters}
        dollars = self.dollars(hardware)
        return known | {
            "rows": self.rows,
            "time_is_for_rows": rows or ROWS_SHOWN,
            "dollars": None if dollars is None else dollars[1],
            "dollars_range": None if dollars is None else [dollars[0], dollars[2]],
            "measured_on_gpu": False,
            "options": [way.to_json() for way in self.ways],
            "remedies": list(self.remedies),
            "notes": list(self.notes),
        }


def plan_hardware(
    pipeline: Pipeline,
    store: Store,
    hardware: Hardware,
    *,
    rows: int | None = None,
    fill: float = 1.0,
    configs: dict[str, Architecture] | None = None,
) -> list[StagePlan]:
    """Plan every stage that trains, samples or scores, in order.

    ``rows`` replaces the rows of data that is not finished. ``fill`` is the mean length of rows as a share of the
    greatest. ``configs`` are architectures of ``model`` stages whose ``config.json`` is not on this machine, by stage.
    """
    planner = _Planner(pipeline, store, hardware, rows, fill)
    plans = []
    for node in pipeline:
        # Stages are planned apart, since they run one after the other on all devices.
        estimator = estimator_of(node.stage)
        if estimator is None:
            continue
        try:
            models = input_models(pipeline, node, store, configs)
            plan = planner.plan_training if hasattr(estimator, "job") else planner.plan_inference
            plans.append(plan(node, models, estimator))
        except UnknownArchitecture as error:
            plans.append(StagePlan(node.name, node.stage.kind, unknown=str(error)))
    return plans


@dataclass(frozen=True)
class _Planner:
    """Planner of stages, with everything that all stages of a plan share."""

    pipeline: Pipeline
    store: Store
    hardware: Hardware
    rows: int | None
    fill: float

    def plan_training(self, node: Node, models: Models, estimator: Any) -> StagePlan:
        """Plan a stage that trains."""
        runtime = self.pipeline.runtimes[node.name]
        hardware = self._launch_hardware(node)
        config = with_expected_precision(node.config, gpu=self.hardware.device.gpu)
        job: Job = estimator.job(config, models, runtime)
        data_rows = self._training_rows(node)
        rows = job.rows(self.rows if data_rows is None else data_rows)
        requested = None
        if runtime.launch != LaunchConfig():
            requested = requested_strategy(runtime.launch, hardware.devices, job.checkpointing)
        # Without known rows, time and cost are for a round number, which the table states.
        ways = training_ways(job, hardware, rows or ROWS_SHOWN, self.fill, requested)
        remedies: list[str] = []
        if not ways[0].fits:
            # Remedies are tried, not guessed: each is a full plan of the stage with that setting.
            smaller = _smaller(node.name, config, LESS_TO_TRAIN, lambda config: estimator.job(config, models, runtime))
            remedies = training_remedies(job, hardware, ways, smaller, requested)
        return StagePlan(
            node.name,
            node.stage.kind,
            job=job,
            ways=tuple(ways),
            rows=rows,
            hardware=hardware,
            requested=requested,
            remedies=tuple(remedies),
            notes=job.notes,
        )

    def plan_inference(self, node: Node, models: Models, estimator: Any) -> StagePlan:
        """Plan a stage that samples or scores."""
        runtime = self.pipeline.runtimes[node.name]
        input_rows = self._input_rows(node)
        config = with_expected_precision(node.config, gpu=self.hardware.device.gpu)
        inference: Inference = estimator.inference(config, models, input_rows)
        ways: list[Way] = []
        if inference.sampling or inference.scoring:
            ways = sampling_ways(inference, runtime, self.hardware, self.fill)
        remedies: list[str] = []
        if ways and not ways[0].fits:
            # Remedies are tried only where they are needed: each one plans the stage again.
            smaller = _smaller(node.name, config, {}, lambda config: estimator.inference(config, models, input_rows))
            remedies = sampling_remedies(inference, runtime, self.hardware, smaller)
        plan = StagePlan(
            node.name,
            node.stage.kind,
            inference=inference,
            ways=tuple(ways),
            rows=inference.rows if inference.rows_are_known or self.rows is not None else None,
            hardware=self.hardware,
            remedies=tuple(remedies),
        )
        return replace(plan, notes=tuple(sampling_notes(inference, runtime, self.hardware, plan.best)))

    def _launch_hardware(self, node: Node) -> Hardware:
        """Return the devices that the stage's ``launch`` asks for; raise ``UserError`` if there are fewer."""
        launch, hardware = self.pipeline.runtimes[node.name].launch, self.hardware
        if launch == LaunchConfig():
            return hardware
        per_node = hardware.per_node if launch.processes == "auto" else launch.processes
        if launch.nodes > hardware.nodes or per_node > hardware.per_node:
            raise UserError(
                f"{self.pipeline.where}: stages.{node.name} asks for {launch.nodes} x {per_node} processes "
                f"(runtime.launch), and --hardware {hardware.label} has {hardware.nodes} x {hardware.per_node} "
                "devices. Change one of them."
            )
        return replace(hardware, nodes=launch.nodes, per_node=per_node)

    def _metrics(self, stage: str) -> dict[str, Any]:
        """Return the metrics of a stage's finished artifact; empty if there is none."""
        node = self.pipeline.nodes[stage]
        artifact = self.store.find_intact(node.stage.kind, node.key, stage)
        return {} if artifact is None else artifact.record.get("metrics") or {}

    def _training_rows(self, node: Node) -> int | None:
        """Return the training rows that the stage makes of its data; None while that is not finished."""
        name = node.inputs.get("data")
        if not isinstance(name, str):
            return None
        metrics = self._metrics(name)
        rows = next((int(metrics[field]) for field in ROW_METRICS if metrics.get(field)), None)
        has_pairs = self.pipeline.nodes[name].makes == Kind.PREFERENCES
        return rows * getattr(node.config, "rows_of_a_pair", 1) if rows is not None and has_pairs else rows

    def _input_rows(self, node: Node) -> dict[str, Rows]:
        """Return the rows of each input's splits, by its field."""
        stand_in = self.rows or ROWS_SHOWN
        rows = {}
        for field, name in node.inputs.items():
            if isinstance(name, str):
                metrics = self._metrics(name)
                rows[field] = Rows(_split_rows(metrics, "train"), _split_rows(metrics, "test"), stand_in)
        return rows


def _split_rows(metrics: dict[str, Any], split: str) -> int | None:
    return next((int(metrics[key]) for key in (f"{split}_rows", f"{split}_pairs") if key in metrics), None)


def _smaller(
    name: str, config: Any, settings: dict[str, dict[str, Any]], build: Callable[[Any], Load]
) -> dict[str, Load]:
    """Return the loads that ``build`` makes of the stage with reduced settings, by the option that asks for them.

    Settings that the stage does not allow are left out.
    """
    place = f"stages.{name}"
    changes = {f"--set '{place}.{words}'": fields for words, fields in settings.items()}
    for field in LENGTH_FIELDS:
        if hasattr(config, field):
            half = getattr(config, field) // 2
            changes[f"--set {place}.{field}={half}"] = {field: half}
    loads = {}
    for option, fields in changes.items():
        try:
            loads[option] = build(validate_plain(type(config), config.model_dump(mode="json") | fields))
        except (ValueError, UnknownArchitecture):
            continue
    return loads


def refuse_what_fits_nowhere(pipeline: Pipeline, plans: list[StagePlan], hardware: Hardware) -> None:
    """Raise ``UserError`` with the remedies if a stage fits in none of its ways."""
    lines = []
    for plan in plans:
        if not plan.ways or plan.best is not None:
            continue
        nearest = min(plan.ways, key=_distance)
        remedy = f"What does: {'; or '.join(plan.remedies)}." if plan.remedies else "Take a smaller model."
        lines.append(
            f"{pipeline.where}: stages.{plan.name} fits on {hardware.label} in no way; nearest is {nearest.label}: "
            f"{nearest.obstacle}. {remedy}"
        )
    if lines:
        raise UserError("\n".join(lines))


def _distance(way: Way) -> tuple[bool, bool, int]:
    """Sort key of ways that do not fit: first those that the stage can run, and whose engine fits.

    There only a later phase is too large.
    """
    # False sorts before True.
    is_engine_too_large = isinstance(way.layout, EngineLayout) and not way.largest
    return way.is_refused, is_engine_too_large, way.peak


def read_configs(pipeline: Pipeline, texts: list[str]) -> dict[str, Architecture]:
    """Parse ``STAGE=config.json`` of the command line; raise ``UserError`` for an unknown stage or file."""
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
