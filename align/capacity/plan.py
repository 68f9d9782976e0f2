"""Memory of a pipeline's stages, and the ways in which they fit on given hardware. Never imports torch.

The record of a kind names its estimator, a module (``Stage.estimator``). It has ``estimate`` and ``job`` for a kind
that trains, ``inference`` for a kind that samples or scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

from align.capacity.hardware import (
    Device,
    Hardware,
    Strategy,
    Way,
    largest_that_fits,
    launch_of,
    processor,
    requested_strategy,
)
from align.capacity.memory import Estimate
from align.capacity.sampling import Inference, sampling_notes, sampling_way
from align.capacity.sharding import Job, TrainingWay, beside_engine, training_ways
from align.config.runtime import Runtime
from align.config.runtime.launch import LaunchConfig, world_size
from align.config.tuning import FullTuning, LowRank
from align.config.validation import validate_plain
from align.errors import UserError
from align.models.compute.architecture import Architecture, UnknownArchitecture
from align.models.compute.costs import with_expected_precision
from align.models.compute.model_types import read_architecture
from align.pipeline.context import MemoryGuess
from align.pipeline.pipeline import Node, Pipeline
from align.registry import Stage, load
from align.store.artifacts import GENERATORS, Artifact, Kind
from align.store.store import Store

CHECKPOINTS = (*GENERATORS, Kind.REWARD)
MACHINE_FACTORS = (2, 4, 8, 16, 32, 64)
"""Factors of the number of machines that a remedy may ask for."""
LENGTH_FIELDS = ("max_length", "max_tokens", "max_prompt_tokens", "max_context")
"""Fields of a stage's config that a remedy may shorten."""
LENGTH_STEP = 32
"""Tokens by which it does."""

Models = dict[str, list[Architecture]]


# ---- align plan --memory ----


def estimator_of(stage: Stage) -> ModuleType | None:
    """Import the estimator of a kind; None for a kind without one."""
    return None if stage.estimator is None else load(stage.estimator)


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
class Setup:
    """A stage with its settings, on hardware."""

    estimator: Any
    models: Models
    config: Any
    runtime: Runtime
    hardware: Hardware
    """The devices that the stage runs on: all of them, unless ``runtime.launch`` asks for fewer."""

    @cached_property
    def load(self) -> Job | Inference:
        """The load of the stage."""
        if hasattr(self.estimator, "job"):
            job: Job = self.estimator.job(self.config, self.models, self.runtime)
            return job
        inference: Inference = self.estimator.inference(self.config, self.models)
        return inference

    @property
    def requested(self) -> Strategy | None:
        """The strategy that ``runtime.launch`` names, if the stage trains."""
        if not isinstance(self.load, Job) or self.runtime.launch == LaunchConfig():
            return None
        return requested_strategy(
            self.runtime.launch,
            self.hardware.devices,
            checkpointing=self.load.checkpointing,
            host=self.load.host or (),
        )

    def ways(self) -> Sequence[Way]:
        """Return the ways that fit, the simplest first, then the others; empty for a stage without a model."""
        if isinstance(self.load, Job):
            return training_ways(self.load, self.hardware, self.requested)
        has_model = self.load.sampling or self.load.scoring
        return [sampling_way(self.load, self.runtime, self.hardware)] if has_model else []

    @property
    def notes(self) -> Sequence[str]:
        """Notes about the numbers, one sentence each."""
        if isinstance(self.load, Job):
            return self.load.notes
        return sampling_notes(self.load, self.runtime, self.hardware)

    def fits(self, **changes: Any) -> bool:
        """Return whether the stage fits with other settings, or on other hardware."""
        return any(way.fits for way in replace(self, **changes).ways())


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage; ``unknown`` says why there is none, and the rest is empty then."""

    name: str
    kind: str
    setup: Setup | None = None
    ways: Sequence[Way] = ()
    """Ways that fit come first, the simplest at the head."""
    unknown: str = ""
    remedies: Sequence[str] = ()
    useless: str = ""
    """A sentence about a change that does not help; empty for none."""

    @property
    def load(self) -> Job | Inference | None:
        """The load of the stage; None if it is unknown."""
        return None if self.setup is None else self.setup.load

    @property
    def notes(self) -> Sequence[str]:
        """Notes about the numbers, one sentence each."""
        return () if self.setup is None else self.setup.notes

    @property
    def best(self) -> Way | None:
        """The simplest way that fits."""
        return self.ways[0] if self.ways and self.ways[0].fits else None

    def to_json(self) -> dict[str, Any]:
        """Return everything in bytes and words."""
        fields: dict[str, Any] = {"stage": self.name, "kind": self.kind}
        load = self.load
        if isinstance(load, Inference):
            sizes = [model.parameters for model in load.models]
            fields |= {"external": load.external or None, "parameters": max(sizes, default=None)}
        elif load is not None:
            fields |= {"parameters": load.model.parameters}
        else:
            return fields | {"unknown": self.unknown}
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
        try:
            models = input_models(pipeline, node, store, configs)
            plans.append(_plan_stage(pipeline, node, models, estimator, hardware))
        except UnknownArchitecture as error:
            plans.append(StagePlan(node.name, node.stage.kind, unknown=str(error)))
    return plans


def fit_to_memory(
    stage: Stage, config: Any, inputs: Mapping[str, Any], runtime: Runtime, gpu: tuple[int, int] | None
) -> tuple[Runtime, MemoryGuess | None]:
    """Return a stage's settings with what the plan chooses for this process, and its guess at the micro-batch.

    ``inputs`` are the stage's artifacts, ``gpu`` the free and the total bytes of the process's GPU, None on a CPU. The
    guess is None for a stage that does not train, and for a model without a rule.
    """
    estimator = estimator_of(stage)
    if estimator is None:
        return runtime, None
    try:
        models = {field: _architectures(artifacts) for field, artifacts in inputs.items() if artifacts}
        device = processor() if gpu is None else Device("gpu", gpu[0])
        hardware = Hardware(device, per_node=world_size()).shared()
        setup = Setup(estimator, models, with_expected_precision(config, gpu=gpu is not None), runtime, hardware)
        way = next(iter(setup.ways()), None)
    except UnknownArchitecture:
        return runtime, None
    load = setup.load
    trainer_bytes = 0
    if isinstance(load, Job) and isinstance(way, TrainingWay):
        trainer_bytes = beside_engine(load, hardware, way)
    if gpu is not None and runtime.engine.gpu_memory == "auto" and not runtime.rollouts.pooled:
        share = min(max(hardware.device.usable - trainer_bytes, 0.01 * gpu[1]) / gpu[1], 0.95)
        runtime = runtime.model_copy(update={"engine": runtime.engine.model_copy(update={"gpu_memory": share})})
    if not isinstance(load, Job) or not isinstance(way, TrainingWay):
        return runtime, None
    runtime = runtime.model_copy(update={"offload": list(way.strategy.host)})
    return runtime, MemoryGuess(max(way.batch, load.unit), way.strategy.checkpointing)


def _architectures(found: Any) -> list[Architecture]:
    """Return the architectures of the models in an input's artifacts."""
    artifacts: list[Artifact] = found if isinstance(found, list) else [found]
    return [read_architecture(artifact.model / "config.json") for artifact in artifacts if artifact.kind in CHECKPOINTS]


def _plan_stage(pipeline: Pipeline, node: Node, models: Models, estimator: Any, all_hardware: Hardware) -> StagePlan:
    hardware = all_hardware
    if hasattr(estimator, "job"):
        hardware = _launch_hardware(pipeline, node, all_hardware)
    config = with_expected_precision(node.config, gpu=hardware.device.gpu)
    setup = Setup(estimator, models, config, pipeline.runtimes[node.name], hardware)
    ways = setup.ways()
    remedies: list[str] = []
    useless = ""
    if ways and not ways[0].fits:
        remedies = _remedies(setup, f"stages.{node.name}")
        tuning = getattr(config, "tuning", None)
        if isinstance(tuning, LowRank) and not _fits_with(setup, {"tuning": tuning.model_dump() | {"rank": 1}}):
            useless = "A smaller rank does not help."
    return StagePlan(node.name, node.stage.kind, setup, ways, remedies=remedies, useless=useless)


def _remedies(setup: Setup, place: str) -> list[str]:
    """Return command-line options with which the stage fits. Each was tried, as a full plan of the stage.

    They are settings of the engine, more machines, another card, or settings of the stage that need less memory.
    """
    load = setup.load
    hardware = setup.hardware
    if isinstance(load, Job) and load.batch % hardware.devices:
        # No memory would help; the next larger batch that divides does.
        next_batch = -(-load.batch // hardware.devices) * hardware.devices
        return [f"{next_batch} {load.row} a step, which divide among {hardware.devices} devices"]
    if setup.requested is not None:
        # The launch also sets the number of devices, so another launch is proposed, and no other hardware.
        return _launch_options(load, hardware) + _smaller_options(setup, place)
    remedies = _engine_options(setup)
    candidates = [hardware.other_cards()]
    if isinstance(load, Job):
        candidates.insert(0, [replace(hardware, nodes=hardware.nodes * factor) for factor in MACHINE_FACTORS])
    for larger in candidates:
        # The fewest machines that are enough, then the smallest other card.
        enough = next((devices for devices in larger if setup.fits(hardware=devices)), None)
        if enough is not None:
            remedies.append(f"--hardware {enough.label}")
    return remedies + _smaller_options(setup, place)


def _launch_options(job: Any, hardware: Hardware) -> list[str]:
    """Return the option of the simplest launch on these devices that fits without another setting."""
    for way in training_ways(job, hardware) if hardware.devices > 1 else ():
        if way.fits and way.strategy.checkpointing == job.checkpointing:
            block = launch_of(way.strategy, hardware).model_dump(exclude_unset=True)
            return [f"--set runtime.launch='{json.dumps(block)}'"]
    return []


def _engine_options(setup: Setup) -> list[str]:
    """Return settings of the engine with which the stage fits: they are free."""
    engine = setup.runtime.engine
    changes: dict[str, Any] = {}
    if setup.hardware.device.gpu and engine.gpu_memory != "auto":
        changes["gpu_memory"] = "auto"
    if isinstance(setup.load, Inference) and engine.name == "transformers":
        changes["name"] = "vllm"
    options = []
    for field, value in changes.items():
        runtime = setup.runtime.model_copy(update={"engine": engine.model_copy(update={field: value})})
        if setup.fits(runtime=runtime):
            options.append(f"--set runtime.engine.{field}={value}")
    return options


def _smaller_options(setup: Setup, place: str) -> list[str]:
    """Return settings of the stage that need less memory, and with which it fits."""
    changes: dict[str, dict[str, Any]] = {}
    if isinstance(setup.load, Job):
        for method in ("lora", "qlora"):
            changes[f"--set '{place}.tuning={{method: {method}}}'"] = {"tuning": {"method": method}}
        if isinstance(setup.load.tuning, FullTuning):
            trainer = setup.config.trainer | {"optim": "adamw_8bit"}
            changes[f"--set {place}.trainer.optim=adamw_8bit"] = {"trainer": trainer}
    options = [option for option, fields in changes.items() if _fits_with(setup, fields)]
    for field in LENGTH_FIELDS:
        steps = getattr(setup.config, field, 0) // LENGTH_STEP

        def fits(count: int, field: str = field) -> bool:
            return _fits_with(setup, {field: LENGTH_STEP * count})

        fitting = largest_that_fits(fits, steps)
        if fitting:
            options.append(f"--set {place}.{field}={LENGTH_STEP * fitting}")
    return options


def _fits_with(setup: Setup, fields: Mapping[str, Any]) -> bool:
    """Return whether the stage allows other ``fields``, and fits with them."""
    try:
        return setup.fits(config=validate_plain(type(setup.config), setup.config.model_dump(mode="json") | fields))
    except (ValueError, UnknownArchitecture):
        return False


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
