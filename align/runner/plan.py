"""The plan of a run, stage by stage: run, resume or cached, and the fields that changed. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from align.capacity.memory import resolve_engine
from align.config.stages.continue_from import (
    CONTINUE,
    DATA,
    END,
    LENGTHS,
    OBSERVED,
    STATE,
    changed_names,
    inexactness,
    size_text,
    steps_per_length,
    unit_of,
)
from align.config.validation import suggest
from align.errors import UserError, plain_number
from align.pipeline.inheritance import CHECKPOINT, COMPLETE, length_value, with_end
from align.pipeline.pipeline import Node, Pipeline
from align.runner.plan_warnings import stage_warnings, suggest_change
from align.store.artifacts import CHECKPOINTS, Artifact
from align.store.fingerprint import digest
from align.store.record import RECORD, SHORT, DamagedRecord
from align.store.store import Store


@dataclass(frozen=True)
class Step:
    """One stage in a plan.

    ``action`` is ``cached``, ``fetch``, ``run``, ``resume`` or ``damaged``; ``why`` says it in words. ``notes`` are
    statements about stages that continue another, and warnings (``align.runner.plan_warnings``).
    """

    node: Node
    action: str
    why: str
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan(
    pipeline: Pipeline, store: Store, force: frozenset[str] | set[str] = frozenset(), runs_scores: bool = True
) -> list[Step]:
    """Return what a run would do now, stage by stage. ``force`` are stages that run although they are cached.

    ``runs_scores``: the user's functions that score may be called, to validate them.
    """
    steps: list[Step] = []
    # Stages that will run: a stage that reads any of them has not been run with this input yet.
    fresh: set[str] = set()
    history = History(pipeline, store)
    for node in pipeline:
        try:
            artifact = (store.find_intact if node.name in force else store.find)(node.stage.kind, node.key, node.name)
        except DamagedRecord as error:
            steps.append(Step(node, "damaged", f"{RECORD} {error.finding}"))
            continue
        waits_for = [name for name in node.input_names if name in fresh]
        if artifact is not None and node.name not in force:
            # Sizes and times only: a plan must not hash every checkpoint of the store.
            problems = store.problems(artifact, thorough=False)
            if problems:
                steps.append(Step(node, "damaged", f"{problems[0].path.name} {problems[0].description}"))
                continue
            precision = artifact.record.get("precision")
            how = f", in {precision}" if precision else ""
            steps.append(Step(node, "cached", f"made {artifact.record['created'][:16].replace('T', ' ')}{how}"))
            continue
        # A forced stage runs in any case, so the remote is not asked for it.
        remote = store.remote if artifact is None and node.name not in force else None
        try:
            record = remote.find(node.stage.kind, node.key) if remote is not None else None
        except DamagedRecord as error:
            steps.append(Step(node, "damaged", f"{error.path} {error.finding}"))
            continue
        if remote is not None and record is not None:
            created = str(record["created"])[:16].replace("T", " ")
            steps.append(Step(node, "fetch", f"made {created}, in {remote.address}"))
            continue
        # The first reason that holds is shown: forced, resumable, changed, or waiting for another stage.
        changes = history.explain(node) if artifact is None else []
        if node.name in force and store.folder(node.stage.kind, node.key).exists():
            step = Step(node, "run", "requested by an option")
        elif any((store.partial(node.stage.kind, node.key) / CHECKPOINTS).glob("*")):
            step = Step(node, "resume", "an earlier attempt left checkpoints")
        elif changes:
            step = Step(node, "run", "; ".join(changes[:3]), tuple(changes))
        else:
            step = Step(node, "run", f"needs {waits_for[0]}" if waits_for else "never run")
        notes = [*describe(pipeline, store, node), *stage_warnings(pipeline, node, store, runs_scores)]
        suggestion = history.suggest(node) if artifact is None else None
        steps.append(replace(step, notes=(*notes, *([suggestion] if suggestion else []))))
        fresh.add(node.name)
    return steps


class History:
    """Artifacts of earlier runs of a pipeline's name. The store's records are read once, at the first question."""

    def __init__(self, pipeline: Pipeline, store: Store) -> None:
        self.pipeline = pipeline
        self.store = store

    @cached_property
    def _artifacts(self) -> list[Artifact]:
        """Every finished artifact of the store, oldest first."""
        return self.store.all()

    def suggest(self, node: Node) -> str | None:
        """Return how to train less by continuing a finished or stopped stage; None if the stage must do all."""
        known = (self.pipeline, node, self._artifacts)
        return suggest_continuing(*known) or suggest_change(*known, self.store) if node.stage.distributed else None

    @cached_property
    def _newest(self) -> dict[tuple[str, str], Artifact]:
        """By stage kind and name."""
        return {
            # Later artifacts replace earlier artifacts of the same stage.
            (artifact.record["kind"], artifact.record["stage"]): artifact
            for artifact in self._artifacts
            if artifact.record.get("pipeline") == self.pipeline.name
        }

    def previous(self, node: Node) -> Artifact | None:
        """The newest artifact that this stage made in a run of the same name, or None."""
        return self._newest.get((node.stage.kind, node.name))

    def state(self, node: Node) -> str:
        """Return whether a stage's settings equal its last finished self's, or another finished stage's."""
        last = self.previous(node)
        if last is not None and last.record["key"] == node.key:
            return "unchanged"
        # Runs share stages with equal keys, and a run may return to earlier settings.
        same_key = next((artifact for artifact in self._artifacts if artifact.record["key"] == node.key), None)
        if last is None and same_key is not None:
            return f"finished as '{same_key.stage}' in run '{same_key.record.get('pipeline')}'"
        if last is None:
            return "never finished"
        return "changed" if same_key is None else "changed, and finished before with these settings"

    def explain(self, node: Node) -> list[str]:
        """Differences between this stage and its last finished self, one line a field; empty when there is none."""
        last = self.previous(node)
        if last is None or last.record["key"] == node.key:
            return []
        # Inputs are recorded by key, and readers know stages by name. Both runs' names are needed.
        names = {artifact["key"]: artifact["stage"] for artifact in last.record["input_stages"]}
        current = {other.key: other.name for other in self.pipeline}
        return list(_differences(last.record["parts"], _json_copy(node.parts), "", {**names, **current}))


def _differences(old: Any, new: Any, path: str, names: dict[str, str]) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            # Paths are shown as the YAML has them, without the prefix ``config``.
            below = key if path in ("", "config") else f"{path}.{key}"
            if key not in old:
                yield f"{below} is new: {new[key]!r}"
            elif key not in new:
                yield f"{below} is gone"
            else:
                yield from _differences(old[key], new[key], below, names)
    elif old != new:
        if path.startswith("inputs."):
            # The keys differ. The names of the changed inputs say more than two digests.
            keys = new if isinstance(new, list) else [new]
            changed = [names.get(key, "?") for key in keys if key not in (old if isinstance(old, list) else [old])]
            yield f"input {path.removeprefix('inputs.')} changed ({', '.join(changed) or 'order'})"
        elif path.startswith("identities."):
            yield f"content of {path.removeprefix('identities.')} changed"
        else:
            yield f"{path}: {old!r} → {new!r}"


def choose_stages(
    pipeline: Pipeline, store: Store, only: str | None, from_: str | None, rebuild: tuple[str, ...]
) -> set[str]:
    """Stages to run although they are cached; checks the names, and with ``only`` that the inputs are there.

    A stage of a loop is named with its round (``dpo-2``). Without it ``only`` means the last round, and the others mean
    every round.
    """
    for option, name in [("--only", only), ("--from", from_), *(("--rebuild", item) for item in rebuild)]:
        if name is not None and pipeline.resolve(name) not in pipeline.nodes:
            names = [*pipeline.nodes, *pipeline.expanded.rounds]
            raise UserError(f"{option} {name}: there is no such stage.{suggest(name, names)}")
    force = {name for item in rebuild for name in pipeline.expanded.every(item)}
    if from_ is not None:
        force.update(pipeline.expanded.every(from_))
        # The pipeline is in order, so one pass reaches everything downstream.
        for node in pipeline:
            if any(name in force for name in node.input_names):
                force.add(node.name)
    if only is not None:
        only = pipeline.resolve(only)
        inputs = [pipeline.nodes[name] for name in pipeline.nodes[only].input_names]
        missing = [node.name for node in inputs if store.find(node.stage.kind, node.key, node.name) is None]
        if missing:
            raise UserError(
                f"--only {only}: it reads {', '.join(missing)}, not finished yet. Run without --only first."
            )
        # No other stage runs, so no other stage may count as about to be made.
        force &= {only}
    return force


def stages_to_make(pipeline: Pipeline, store: Store, only: str | None, force: set[str]) -> list[Node]:
    """Return the stages that a run makes, in order: ``only`` or all, without finished stages outside ``force``."""
    nodes = list(pipeline) if only is None else [pipeline.nodes[pipeline.resolve(only)]]
    return [node for node in nodes if node.name in force or store.find(node.stage.kind, node.key, node.name) is None]


STATE_FILE = f"{STATE}/state.json"


def refuse_without_state(pipeline: Pipeline, store: Store, nodes: Iterable[Node], force: set[str]) -> None:
    """Raise ``UserError`` for a stage whose finished source kept no state, or ended early, before anything starts."""
    for node in nodes:
        source = _source(pipeline, node)
        # A source that this run makes keeps its state, because a stage continues it (``Pipeline``).
        if source is None or source.name in force:
            continue
        artifact = store.find_intact(source.stage.kind, source.key, source.name)
        objection = None if artifact is None else _objection(artifact, node)
        if objection is not None:
            raise UserError(f"stage '{node.name}' continues '{source.name}', which {objection}")


def _source(pipeline: Pipeline, node: Node) -> Node | None:
    name = node.inputs.get(CONTINUE)
    return pipeline.nodes[name] if isinstance(name, str) else None


def _objection(artifact: Artifact, node: Node | None = None) -> str | None:
    """Return why a stage cannot continue a finished stage, as a clause with a remedy; None if it can.

    ``node`` is the stage that would continue it, by default with the same settings.
    """
    metrics = artifact.record["metrics"]
    stopped = metrics.get("stopped") or ("by early_stopping" if metrics.get("stopped_early") else None)
    if stopped and (node is None or not changed_names(node.config)):
        return (
            f"ended early ({stopped}). To continue it with other settings, write "
            f"`{CONTINUE}: {{stage: {artifact.stage}, change: {{FIELD: VALUE}}}}`."
        )
    if STATE_FILE not in artifact.record["outputs"]:
        return (
            "was finished without the trainer's state. "
            f"`--rebuild {artifact.stage}` runs it again and keeps the state, since a stage continues it."
        )
    return None


def describe(pipeline: Pipeline, store: Store, node: Node) -> list[str]:
    """Return what a plan says about a stage that continues another and is to run: its start, and if it is equal."""
    source = _source(pipeline, node)
    if source is None:
        return _describe_end(pipeline, store, node)
    artifact = store.find_intact(source.stage.kind, source.key, source.name)
    objection = None if artifact is None else _objection(artifact, node)
    if objection is not None:
        return [f"'{source.name}' {objection}"]
    finished_steps = _steps(source, artifact)
    total = _steps(node, None)
    reason = inexactness(node.config, finished_steps, total)
    if any(getattr(node.config, name, None) != getattr(source.config, name, None) for name in DATA):
        reason = "it has other rows: those that are new come first"
    at_once = _length(node)
    state = ""
    if artifact is not None:
        files = artifact.record["outputs"].items()
        size = sum(entry["bytes"] for name, entry in files if name.startswith(f"{STATE}/"))
        state = f" (its state: {size_text(size)})"
    end = getattr(source.config, END)
    start = f"continues '{source.name}'{state}{'' if end is None else f' after {unit_of(source.config)} {end}'}"
    before, after = (_changing_settings(each, changed_names(node.config)) for each in (source, node))
    changes = list(_differences(before, after, "", {}))
    if changes:
        return [f"{start}, from there on with other settings: {'; '.join(changes)}"]
    if reason is None:
        return [f"{start}; equals {at_once} at once, {_exactness(pipeline, node)}"]
    return [f"{start}; differs from {at_once} at once: {reason}"]


def _describe_end(pipeline: Pipeline, store: Store, node: Node) -> list[str]:
    """Return the step at which a stage ends because another continues it, and whether its state is there."""
    end = getattr(node.config, END, None)
    if end is None:
        return []
    folder = store.partial(node.stage.kind, digest(with_end(node.parts, None))) / CHECKPOINTS
    has_state = (folder / f"{CHECKPOINT}{end * steps_per_length(node.config)}" / COMPLETE).is_file()
    state = "its checkpoint is there" if has_state else "no state is kept there, so it trains up to there"
    names = ", ".join(f"'{other.name}'" for other in pipeline if other.inputs.get(CONTINUE) == node.name)
    return [f"ends after {unit_of(node.config)} {end}, where {names} continues it; {state}"]


def _changing_settings(node: Node, names: frozenset[str]) -> dict[str, Any]:
    return _json_copy(node.config.model_dump(mode="json", include=set(names)))


def _exactness(pipeline: Pipeline, node: Node) -> str:
    """Return how exactly a continued stage equals one run of all its steps, as a clause."""
    samples = node.stage.samples and getattr(node.config, "on_policy", 1) > 0
    if samples and resolve_engine(pipeline.runtimes[node.name])[0] != "transformers":
        return "but for vLLM's rounding, which can change a sampled token: prompts and seeds are the same"
    return "bit for bit on a CPU"


def suggest_continuing(pipeline: Pipeline, node: Node, artifacts: Iterable[Artifact]) -> str | None:
    """Return how to train only the steps that no finished stage has done; None if none has done the first steps.

    ``artifacts`` are the store's artifacts. An artifact counts if it has fewer steps, an equal configuration otherwise,
    and its state.
    """
    if CONTINUE not in type(node.config).model_fields or getattr(node.config, CONTINUE) is not None:
        return None
    beginnings = [artifact for artifact in artifacts if _is_beginning(artifact, node)]
    shorter = [artifact for artifact in beginnings if _objection(artifact) is None]
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
    steps_done = f"{plain_number(_done(best))} {'updates' if 'updates' in settings else 'steps'}"
    return (
        f"'{node.name}': its first {steps_done} are finished ({node.stage.kind}/{best.record['key'][:SHORT]}). "
        f"To train only the others, {equal}: leave {_yaml(changed)} in stages.{node.name}, add "
        f"`{more}: {{{CONTINUE}: {node.name}, {_yaml(now)}}}` below it, and name {more} where {node.name} is read."
    )


def _is_beginning(artifact: Artifact, node: Node) -> bool:
    """Return True for the artifact of a stage that equals ``node`` but for a shorter length."""
    record = artifact.record
    if record["kind"] != node.stage.kind or record["parts"].get("config") is None:
        return False
    old = _json_copy(record["parts"])
    new = _json_copy(node.parts)
    lengths = [name for name in LENGTHS if name in new["config"]]
    pairs = [(length_value(old["config"].get(name)), length_value(new["config"].get(name))) for name in lengths]
    for parts in (old, new):
        # Lengths may differ, and fields that only observe; every other part of the key must be equal.
        for name in (*LENGTHS, *OBSERVED):
            parts["config"].pop(name, None)
    is_shorter = any(before < after for before, after in pairs) and all(before <= after for before, after in pairs)
    return bool(is_shorter and old == new)


def _json_copy(parts: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in the types of JSON, which a record's parts have and a node's parts do not."""
    copy: dict[str, Any] = json.loads(json.dumps(parts))
    return copy


def _done(artifact: Artifact) -> float:
    """Return the steps, or updates, that a finished stage has done."""
    metrics = artifact.record["metrics"]
    return float(metrics.get("updates") or metrics.get("steps") or 0)


def _steps(node: Node, artifact: Artifact | None) -> int | None:
    """Return the optimizer steps that a stage has done, else the steps of its settings; None if unknown."""
    if artifact is not None:
        return int(_done(artifact)) * steps_per_length(node.config)
    length = getattr(node.config, "updates", None) or getattr(node.config, "max_steps", None)
    return None if length is None else int(length) * steps_per_length(node.config)


def _length(node: Node) -> str:
    """Return the setting that ends a stage, as it is written in the YAML."""
    first = next(name for name in LENGTHS if getattr(node.config, name, None) is not None)
    return f"`{first}: {getattr(node.config, first)}`"


def _yaml(settings: dict[str, Any]) -> str:
    texts = {name: "null" if value is None else plain_number(value) for name, value in settings.items()}
    return ", ".join(f"{name}: {text}" for name, text in texts.items())


def _free_name(name: str, pipeline: Pipeline) -> str:
    names = (name, *(f"{name}_{number}" for number in range(2, len(pipeline.nodes) + 3)))
    return next(free for free in names if free not in pipeline.nodes)
