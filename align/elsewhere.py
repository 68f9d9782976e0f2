"""A stage that another machine is to make than the one where the run was started. Never imports torch."""

from __future__ import annotations

import time

from align.pipeline import Node, Pipeline
from align.store import Store


def stages_to_make(pipeline: Pipeline, store: Store, only: str | None, anew: set[str]) -> list[Node]:
    """Those that a run makes, in order: ``only`` that one if given, finished ones only where they are in ``anew``."""
    only = None if only is None else pipeline.resolve(only)
    return [
        node
        for node in pipeline
        if (only is None or node.name == only)
        and (node.name in anew or store.find(node.stage.kind, node.key, node.name) is None)
    ]


def with_threads(pipeline: Pipeline, cores: int | None) -> Pipeline:
    """The pipeline with as many threads as a cluster gave ``cores``, unless it says how many."""
    if pipeline.config.runtime.threads is not None or not cores:
        return pipeline
    raw = {**pipeline.raw, "runtime": {**pipeline.raw.get("runtime", {}), "threads": cores}}
    return Pipeline(raw, pipeline.where, pipeline.base, pipeline.expanded.rounds)


def await_inputs(pipeline: Pipeline, node: Node, store: Store, seconds: float = 60.0) -> None:
    """Wait for what a stage reads, where another machine has just made it: a shared file system may show it late."""
    inputs = [pipeline.nodes[name] for name in node.input_names]
    deadline = time.monotonic() + seconds
    while any(store.find(one.stage.kind, one.key) is None for one in inputs) and time.monotonic() < deadline:
        time.sleep(0.5)


__all__ = ["await_inputs", "stages_to_make", "with_threads"]
