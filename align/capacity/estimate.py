"""Estimates of a pipeline's stages by the estimator of their kind. Never imports torch.

An estimator is a module that the record of a kind names (``Stage.estimator``). It has ``estimate`` and ``job`` for a
kind that trains, ``inference`` for one that samples or scores.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

from align.capacity.memory import Estimate
from align.models.architecture import Architecture, UnknownArchitecture, read_architecture
from align.models.compute_types import with_expected_precision
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.registry import Stage
from align.store.artifacts import GENERATORS, Kind
from align.store.store import Store

CHECKPOINTS = (*GENERATORS, Kind.REWARD)


def estimator_of(stage: Stage) -> ModuleType | None:
    """Import the estimator of a kind; None for a kind without one."""
    return None if stage.estimator is None else importlib.import_module(stage.estimator)


def estimate_memory(pipeline: Pipeline, store: Store) -> dict[str, Estimate | str]:
    """Estimate the memory of each stage that trains, by its name; a sentence where its model's sizes are unknown.

    Architectures are read from a ``config.json``. Where no checkpoint is finished yet, that of the model which the
    stage starts from counts.
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
) -> dict[str, list[Architecture]]:
    """Return the architectures behind each input field that names checkpoints.

    ``overrides`` are architectures by stage name, which come first. Raises ``UnknownArchitecture``.
    """
    fields = {field: [names] if isinstance(names, str) else names for field, names in node.inputs.items() if names}
    return {
        field: [_architecture(pipeline, name, store, overrides or {}) for name in names]
        for field, names in fields.items()
        if names and all(_makes_checkpoint(pipeline, name) for name in names)
    }


def _makes_checkpoint(pipeline: Pipeline, name: str) -> bool:
    return pipeline.nodes[name].makes in CHECKPOINTS


def _architecture(pipeline: Pipeline, name: str, store: Store, overrides: Mapping[str, Architecture]) -> Architecture:
    """Return the sizes of the model that a stage makes, or while that is not finished, of what it starts from."""
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
        # Not finished yet: training keeps the architecture, so the first checkpoint it reads has the same sizes.
        if _makes_checkpoint(pipeline, target):
            return _architecture(pipeline, target, store, overrides)
    raise UnknownArchitecture(f"the model that stage '{name}' makes is known once it is finished")
