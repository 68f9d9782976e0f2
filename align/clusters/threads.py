"""Adjust a pipeline to the machine of a cluster that runs one of its stages. Never imports torch."""

from __future__ import annotations

import copy
import time
from typing import Any

from align.pipeline.pipeline import Node, Pipeline
from align.store.store import Store


def with_threads(pipeline: Pipeline, cores: int | None) -> Pipeline:
    """Return the pipeline with a job's ``cores`` as threads of each stage's processes, unless it sets threads itself.

    Where ``runtime.launch.processes`` is ``auto``, the stage's machine decides.
    """
    if pipeline.config.runtime.threads is not None or not cores:
        return pipeline
    runtime = copy.deepcopy(dict(pipeline.raw.get("runtime") or {}))
    blocks: dict[str, dict[str, Any]] = runtime.setdefault("stages", {})
    for node in pipeline:
        processes = pipeline.runtimes[node.name].launch.processes if node.stage.distributed else 1
        block = blocks.setdefault(_block_name(pipeline, node, blocks), {})
        if processes != "auto" and block.get("threads") is None:
            block["threads"] = max(1, cores // processes)
    # ``runtime`` enters no key, so the stages are still those that were submitted.
    return Pipeline({**pipeline.raw, "runtime": runtime}, pipeline.where, pipeline.base, pipeline.expanded.rounds)


def _block_name(pipeline: Pipeline, node: Node, blocks: dict[str, Any]) -> str:
    """Return the name below ``runtime.stages`` for a stage: its own, or its loop's where only that is set."""
    if node.name in blocks:
        return node.name
    loop_name = next((name for name, rounds in pipeline.expanded.rounds.items() if node.name in rounds), node.name)
    return loop_name if loop_name in blocks else node.name


def await_inputs(pipeline: Pipeline, node: Node, store: Store, seconds: float = 60.0) -> None:
    """Wait for a stage's inputs: a shared file system may show late what another machine has just written."""
    inputs = [pipeline.nodes[name] for name in node.input_names]
    # Past the deadline no error is raised here: the run itself names the inputs that are missing.
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(store.find_intact(source.stage.kind, source.key) is not None for source in inputs):
            return
        time.sleep(0.5)
