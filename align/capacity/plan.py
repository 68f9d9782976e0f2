"""Memory of a pipeline's stages, and the ways in which they fit on given hardware. Never imports torch.

The record of a kind names its estimator, a module (``Stage.estimator``). It has ``estimate`` and ``job`` for a kind
that trains, ``inference`` for a kind that samples or scores.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from align.capacity.hardware import Hardware, Way
from align.capacity.memory import Estimate
from align.capacity.sampling_ways import Inference, sampling_notes, sampling_remedies, sampling_way
from align.capacity.sharding import Job, Strategy, requested_strategy
from align.capacity.training_ways import TrainingWay, training_remedies, training_ways
from align.config.runtime.launch import LaunchConfig
from align.config.validation import suggest, validate_plain
from align.errors import UserError
from align.models.compute.architecture import Architecture, UnknownArchitecture, read_architecture
from align.models.compute.compute_types import with_expected_precision
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.registry import Stage
from align.store.artifacts import GENERATORS, Kind
from align.store.store import Store

CHECKPOINTS = (*GENERATORS, Kind.REWARD)
LESS_TO_TRAIN = {f"tuning={{method: {name}}}": {"tuning": {"method": name}} for name in ("lora", "qlora")}
"""Settings of a stage that trains which need less memory, by their spelling."""
LENGTH_FIELDS = ("max_length", "max_prompt_tokens", "max_context")
"""Fields of a stage's config that a remedy may halve."""

Models = dict[str, list[Architecture]]
Load = TypeVar("Load")


# ---- align plan --memory ----


def estimator_of(stage: Stage) -> ModuleType | None:
    """Import the estimator of a kind; None for a kind without one."""
    return None if stage.estimator is None else importlib.import_module(stage.estimator)


def estimate_memory(pipeline: Pipeline, store: Store) -> dict[str, Estimate | str]:
    """Estimate the memory of each stage that trains, by its name; a sentence if its model's sizes are unknown.

    Architectures are read from a ``config.json``. Before a checkpoint is finished, the architecture of the model that
    its stage starts from is used.
    """
    estimates: dict[str, Estimate | str] = {}
    for node in pipeline:
        estimator = estimator_of(node.stage)
        if estimator is None or not hasattr(estimator, "estimate"):
            continue
        try:
            models = input_models(pipeline, node, store)
            config = with_expected_precision(node.config, gpu=pipeline.runtimes[node.name].device == "cuda")
            estimates[node.name] = estimator.estimate(config, models, pipeline.runtimes[node.name])
        except UnknownArchitecture as error:
            estimates[node.name] = str(error)
    return estimates


def input_models(
    pipeline: Pipeline, node: Node, store: Store, overrides: Mapping[str, Architecture] | None = None
) -> Models:
    """Return the architectures behind each input field that names checkpoints.

    ``overrides`` are architectures by stage name, which come first. Raises ``UnknownArchitecture``.
    """
    models = {}
    for field, names in node.inputs.items():
        stages = [names] if isinstance(names, str) else names
        if stages and all(_makes_checkpoint(pipeline, name) for name in stages):
            models[field] = [_architecture(pipeline, name, store, overrides or {}) for name in stages]
    return models


def _makes_checkpoint(pipeline: Pipeline, name: str) -> bool:
    return pipeline.nodes[name].makes in CHECKPOINTS


def _architecture(pipeline: Pipeline, name: str, store: Store, overrides: Mapping[str, Architecture]) -> Architecture:
    """Return the sizes of a stage's checkpoint, or before it is finished, of the model that the stage starts from."""
    if name in overrides:
        return overrides[name]
    node = pipeline.nodes[name]
    artifact = store.find_intact(node.stage.kind, node.key, name)
    if artifact is not None:
        return read_architecture(artifact.model / "config.json")
    read_base = node.stage.inspect("architecture")
    if read_base is not None:
        architecture: Architecture = read_base(node.config, pipeline.base)
        return architecture
    for target in node.input_names:
        # Training keeps the architecture, so the first checkpoint that the stage reads has the same sizes.
        if _makes_checkpoint(pipeline, target):
            return _architecture(pipeline, target, store, overrides)
    raise UnknownArchitecture(f"the model that stage '{name}' makes is known once it is finished")


# ---- align plan --hardware ----


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage; ``unknown`` says why there is none, and the rest is empty then."""

    name: str
    kind: str
    job: Job | None = None
    """Load of a stage that trains."""
    inference: Inference | None = None
    """Load of a stage that samples or scores; a stage has either."""
    ways: Sequence[Way] = ()
    """Ways that fit come first, the simplest at the head."""
    hardware: Hardware | None = None
    """The devices that the stage runs on: all of them, unless ``runtime.launch`` asks for fewer."""
    requested: Strategy | None = None
    """The strategy that ``runtime.launch`` names; no other is tried then."""
    unknown: str = ""
    remedies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Way | None:
        """The simplest way that fits."""
        return self.ways[0] if self.ways and self.ways[0].fits else None

    def to_json(self) -> dict[str, Any]:
        """Return everything in bytes and words."""
        fields: dict[str, Any] = {"stage": self.name, "kind": self.kind}
        if self.unknown:
            return fields | {"unknown": self.unknown}
        if self.inference is not None:
            sizes = [model.parameters for model in self.inference.models]
            fields |= {"external": self.inference.external or None, "parameters": max(sizes, default=None)}
        elif self.job is not None:
            fields |= {"parameters": self.job.model.parameters}
        return fields | {
            "measured_on_gpu": False,
            "options": [way.to_json() for way in self.ways],
            "remedies": list(self.remedies),
            "notes": list(self.notes),
        }


def plan_hardware(
    pipeline: Pipeline, store: Store, hardware: Hardware, configs: Mapping[str, Architecture] | None = None
) -> list[StagePlan]:
    """Plan every stage that trains, samples or scores, in order.

    ``configs`` are architectures of ``model`` stages whose ``config.json`` is not on this machine, by stage.
    """
    plans = []
    for node in pipeline:
        # Each stage has all devices, since stages run one after the other.
        estimator = estimator_of(node.stage)
        if estimator is None:
            continue
        plan = _plan_training if hasattr(estimator, "job") else _plan_inference
        try:
            models = input_models(pipeline, node, store, configs)
            plans.append(plan(pipeline, node, models, estimator, hardware))
        except UnknownArchitecture as error:
            plans.append(StagePlan(node.name, node.stage.kind, unknown=str(error)))
    return plans


def _plan_training(pipeline: Pipeline, node: Node, models: Models, estimator: Any, all_hardware: Hardware) -> StagePlan:
    runtime = pipeline.runtimes[node.name]
    hardware = _launch_hardware(pipeline, node, all_hardware)
    config = with_expected_precision(node.config, gpu=hardware.device.gpu)
    job: Job = estimator.job(config, models, runtime)
    requested = None
    if runtime.launch != LaunchConfig():
        requested = requested_strategy(runtime.launch, hardware.devices, job.checkpointing)
    ways = training_ways(job, hardware, requested)
    remedies: list[str] = []
    if not ways[0].fits:
        # Remedies are tried, not guessed: each is a full plan of the stage with that setting.
        smaller = _smaller(node.name, config, LESS_TO_TRAIN, lambda config: estimator.job(config, models, runtime))
        remedies = training_remedies(job, hardware, ways, smaller, requested)
    return StagePlan(
        node.name,
        node.stage.kind,
        job=job,
        ways=ways,
        hardware=hardware,
        requested=requested,
        remedies=tuple(remedies),
        notes=job.notes,
    )


def _plan_inference(pipeline: Pipeline, node: Node, models: Models, estimator: Any, hardware: Hardware) -> StagePlan:
    runtime = pipeline.runtimes[node.name]
    config = with_expected_precision(node.config, gpu=hardware.device.gpu)
    inference: Inference = estimator.inference(config, models)
    ways = []
    remedies: list[str] = []
    if inference.sampling or inference.scoring:
        ways = [sampling_way(inference, runtime, hardware)]
    if ways and not ways[0].fits:
        # Remedies are tried only if they are needed: each one plans the stage again.
        smaller = _smaller(node.name, config, {}, lambda config: estimator.inference(config, models))
        remedies = sampling_remedies(inference, runtime, hardware, smaller)
    return StagePlan(
        node.name,
        node.stage.kind,
        inference=inference,
        ways=ways,
        hardware=hardware,
        remedies=tuple(remedies),
        notes=tuple(sampling_notes(inference, runtime, hardware)),
    )


def _launch_hardware(pipeline: Pipeline, node: Node, hardware: Hardware) -> Hardware:
    """Return the devices that the stage's ``launch`` asks for; raise ``UserError`` if there are fewer."""
    launch = pipeline.runtimes[node.name].launch
    if launch == LaunchConfig():
        return hardware
    per_node = hardware.per_node if launch.processes == "auto" else launch.processes
    if launch.nodes > hardware.nodes or per_node > hardware.per_node:
        raise UserError(
            f"{pipeline.where}: stages.{node.name} asks for {launch.nodes} x {per_node} processes "
            f"(runtime.launch), and --hardware {hardware.label} has {hardware.nodes} x {hardware.per_node} "
            "devices. Change one of them."
        )
    return replace(hardware, nodes=launch.nodes, per_node=per_node)


def _smaller(
    name: str, config: Any, settings: dict[str, dict[str, Any]], build: Callable[[Any], Load]
) -> dict[str, Load]:
    """Return the loads that ``build`` makes of the stage with reduced settings, by the option that asks for them.

    Settings that the stage does not allow are skipped.
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
        nearest = plan.ways[0]
        remedy = "Use a smaller model."
        if plan.remedies:
            remedy = f"What does: {'; or '.join(plan.remedies)}."
        elif not isinstance(nearest, TrainingWay):
            remedy = "Use a smaller model, or servers with tensor_parallel (runtime.rollouts), which are not counted."
        lines.append(
            f"{pipeline.where}: stages.{plan.name} fits on {hardware.label} in no way; nearest is {nearest.label}: "
            f"{nearest.obstacle}. {remedy}"
        )
    if lines:
        raise UserError("\n".join(lines))


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
