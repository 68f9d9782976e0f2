"""Statements of a plan about stages that continue another, and about those that could. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from align.capacity.memory import resolve_engine
from align.config.stages.continue_from import (
    CONTINUE,
    DATA,
    LENGTHS,
    OBSERVED,
    STATE,
    inexactness,
    size_text,
    steps_per_length,
)
from align.errors import UserError, plain_number
from align.pipeline.pipeline import Node, Pipeline
from align.store.artifacts import Artifact
from align.store.record import SHORT
from align.store.store import Store

STATE_FILE = f"{STATE}/state.json"


def refuse_without_state(pipeline: Pipeline, store: Store, wanted: Iterable[Node], force: set[str]) -> None:
    """Raise ``UserError`` for a stage whose finished source kept no state, or ended early, before anything starts."""
    for node in wanted:
        source = _source(pipeline, node)
        # A source that this run makes keeps its state, because a stage continues it (``Pipeline``).
        if source is None or source.name in force:
            continue
        artifact = store.find_intact(source.stage.kind, source.key, source.name)
        objection = None if artifact is None else _objection(artifact)
        if objection is not None:
            raise UserError(f"stage '{node.name}' continues '{source.name}', which {objection}")


def _source(pipeline: Pipeline, node: Node) -> Node | None:
    name = node.inputs.get(CONTINUE)
    return pipeline.nodes[name] if isinstance(name, str) else None


def _objection(artifact: Artifact) -> str | None:
    """Return why no stage can continue a finished one, as a clause with a remedy; None where one can."""
    metrics = artifact.record["metrics"]
    stopped = metrics.get("stopped") or ("by early_stopping" if metrics.get("stopped_early") else None)
    if stopped:
        return f"ended early ({stopped}). Start a new run from its weights, with other settings."
    if STATE_FILE not in artifact.record["outputs"]:
        return (
            "was finished without the trainer's state. "
            f"`--rebuild {artifact.stage}` runs it again and keeps the state, since a stage continues it."
        )
    return None


def describe(pipeline: Pipeline, store: Store, node: Node) -> list[str]:
    """Return what a plan says about a stage that continues another and is to run: where it starts, if it is equal."""
    source = _source(pipeline, node)
    if source is None:
        return []
    artifact = store.find_intact(source.stage.kind, source.key, source.name)
    objection = None if artifact is None else _objection(artifact)
    if objection is not None:
        return [f"'{source.name}' {objection}"]
    finished, total = _steps(source, artifact), _steps(node, None)
    reason = inexactness(node.config, finished, total)
    if any(getattr(node.config, name, None) != getattr(source.config, name, None) for name in DATA):
        reason = "it has other rows: those that are new come first"
    at_once = _lengths(node, LENGTHS)
    state = ""
    if artifact is not None:
        files = artifact.record["outputs"].items()
        size = sum(entry["bytes"] for name, entry in files if name.startswith(f"{STATE}/"))
        state = f" (its state: {size_text(size)})"
    start = f"continues '{source.name}'{state}"
    if reason is None:
        return [f"{start}; equals {at_once} at once, {_exactness(pipeline, node)}"]
    return [f"{start}; differs from {at_once} at once: {reason}"]


def _exactness(pipeline: Pipeline, node: Node) -> str:
    """Return how exactly a continued stage equals one run of all its steps, as a clause."""
    samples = node.stage.samples and getattr(node.config, "on_policy", 1) > 0
    if samples and resolve_engine(pipeline.runtimes[node.name])[0] != "transformers":
        return "but for vLLM's rounding, which can change a sampled token: prompts and seeds are the same"
    return "bit for bit on a CPU"


def suggest_continuing(pipeline: Pipeline, node: Node, finished: Iterable[Artifact]) -> str | None:
    """Return how to train only the steps that no finished stage has done; None where none has done the first ones.

    ``finished`` are the store's artifacts. One counts that has fewer steps, an equal configuration otherwise, and its
    state.
    """
    if CONTINUE not in type(node.config).model_fields or getattr(node.config, CONTINUE) is not None:
        return None
    shorter = [artifact for artifact in finished if _is_beginning(artifact, node) and _objection(artifact) is None]
    if not shorter:
        return None
    best = max(shorter, key=_done)
    settings = {name: best.record["config"][name] for name in LENGTHS if name in best.record["config"]}
    changed = {name: value for name, value in settings.items() if value != getattr(node.config, name)}
    now = {name: getattr(node.config, name) for name in changed}
    reason = inexactness(node.config, int(_done(best)) * steps_per_length(node.config), _steps(node, None))
    equal = f"with another result, as {reason}"
    if reason is None:
        equal = f"with the same result, {_exactness(pipeline, node)}"
    more = _free_name(f"{node.name}_more", pipeline)
    done = f"{plain_number(_done(best))} {'updates' if 'updates' in settings else 'steps'}"
    return (
        f"'{node.name}': its first {done} are finished ({node.stage.kind}/{best.record['key'][:SHORT]}). "
        f"To train only the others, {equal}: leave {_yaml(changed)} in stages.{node.name}, add "
        f"`{more}: {{{CONTINUE}: {node.name}, {_yaml(now)}}}` below it, and name {more} where {node.name} is read."
    )


def _is_beginning(artifact: Artifact, node: Node) -> bool:
    """Return True for the artifact of a stage that equals ``node`` but for a shorter length."""
    record = artifact.record
    if record["kind"] != node.stage.kind or record["parts"].get("config") is None:
        return False
    old, new = _as_plain(record["parts"]), _as_plain(node.parts)
    lengths = [name for name in LENGTHS if name in new["config"]]
    pairs = [(_count(old["config"].get(name)), _count(new["config"].get(name))) for name in lengths]
    for parts in (old, new):
        # Lengths may differ, and fields that only observe; every other part of the key must be equal.
        for name in (*LENGTHS, *OBSERVED):
            parts["config"].pop(name, None)
    is_shorter = any(before < after for before, after in pairs) and all(before <= after for before, after in pairs)
    return bool(is_shorter and old == new)


def _as_plain(parts: dict[str, Any]) -> dict[str, Any]:
    # A copy, in the types that JSON has: a record's parts have been through JSON, those of a node have not.
    plain: dict[str, Any] = json.loads(json.dumps(parts))
    return plain


def _count(value: float | None) -> float:
    return float("inf") if value is None else float(value)


def _done(artifact: Artifact) -> float:
    """Return the steps, or updates, that a finished stage has done."""
    metrics = artifact.record["metrics"]
    return float(metrics.get("updates") or metrics.get("steps") or 0)


def _steps(node: Node, artifact: Artifact | None) -> int | None:
    """Return the optimizer steps of a stage: those it has done, else those of its settings; None where unknown."""
    if artifact is not None:
        return int(_done(artifact)) * steps_per_length(node.config)
    length = getattr(node.config, "updates", None) or getattr(node.config, "max_steps", None)
    return None if length is None else int(length) * steps_per_length(node.config)


def _lengths(node: Node, names: Iterable[str]) -> str:
    """Return the setting that ends a stage, as it is written in the YAML."""
    settings = {name: getattr(node.config, name) for name in names if getattr(node.config, name, None) is not None}
    first = next(iter(settings))
    return f"`{first}: {settings[first]}`"


def _yaml(settings: dict[str, Any]) -> str:
    texts = {name: "null" if value is None else plain_number(value) for name, value in settings.items()}
    return ", ".join(f"{name}: {text}" for name, text in texts.items())


def _free_name(name: str, pipeline: Pipeline) -> str:
    number = 2
    free = name
    while free in pipeline.nodes:
        free, number = f"{name}_{number}", number + 1
    return free
