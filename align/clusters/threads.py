"""A stage that another machine is to make than the one where the run was started. Never imports torch."""

from __future__ import annotations

import copy
import time
from typing import Any

from align.pipeline.pipeline import Node, Pipeline
from align.store.store import Store


def with_threads(pipeline: Pipeline, cores: int | None) -> Pipeline:
    """The pipeline with a cluster's ``cores`` as threads of each stage's processes, unless it says how many itself.

    Where ``runtime.launch.processes`` is ``auto`` the stage's own machine decides.
    """
    if pipeline.config.runtime.threads is not None or not cores:
        return pipeline
    runtime = copy.deepcopy(dict(pipeline.raw.get("runtime") or {}))
    blocks: dict[str, dict[str, Any]] = runtime.setdefault("stages", {})
    for node in pipeline:
        processes = pipeline.runtimes[node.name].launch.processes if node.stage.distributed else 1
        short = next((name for name, rounds in pipeline.expanded.rounds.items() if node.name in rounds), node.name)
        block = blocks.setdefault(node.name if node.name in blocks or short not in blocks else short, {})
        if processes != "auto" and block.get("threads") is None:
            block["threads"] = max(1, cores // processes)
    return Pipeline({**pipeline.raw, "runtime": runtime}, pipeline.where, pipeline.base, pipeline.expanded.rounds)


def await_inputs(pipeline: Pipeline, node: Node, store: Store, seconds: float = 60.0) -> None:
    """Wait for what a stage reads, where another machine has just made it: a shared file system may show it late."""
    inputs = [pipeline.nodes[name] for name in node.input_names]
    deadline = time.monotonic() + seconds
    while any(store.find_intact(one.stage.kind, one.key) is None for one in inputs) and time.monotonic() < deadline:
        time.sleep(0.5)


__all__ = ["await_inputs", "with_threads"]
