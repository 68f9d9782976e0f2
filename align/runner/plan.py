"""The plan of a run, stage by stage: run, resume or cached, and the fields that changed. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from align.config.validation import suggest
from align.errors import UserError
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.provenance import source_digest
from align.runner.continuations import describe, suggest_continuing
from align.store.artifacts import Artifact
from align.store.partial import CHECKPOINTS
from align.store.record import RECORD, DamagedRecord
from align.store.store import Store


@dataclass(frozen=True)
class Step:
    """One stage in a plan.

    ``action`` is ``cached``, ``fetch``, ``run``, ``resume`` or ``damaged``; ``why`` says it in words. ``notes`` are
    statements about continuing (``align.runner.continuations``).
    """

    node: Node
    action: str
    why: str
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan(pipeline: Pipeline, store: Store, force: frozenset[str] | set[str] = frozenset()) -> list[Step]:
    """Return what a run would do now, stage by stage. ``force`` are stages that run although they are cached."""
    steps: list[Step] = []
    # Stages that will run: whoever reads one of them has not been run with this input yet.
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
        # A forced stage runs in any case, so nobody asks the remote for it.
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
        notes = describe(pipeline, store, node)
        suggestion = history.suggest(node) if artifact is None else None
        steps.append(replace(step, notes=(*notes, *([suggestion] if suggestion else []))))
        fresh.add(node.name)
    return steps


class History:
    """Artifacts of earlier runs of a pipeline's name. The store's records are read once, at the first question."""

    def __init__(self, pipeline: Pipeline, store: Store) -> None:
        self.pipeline, self.store = pipeline, store

    @cached_property
    def _artifacts(self) -> list[Artifact]:
        """Every finished artifact of the store, oldest first."""
        return self.store.all()

    def suggest(self, node: Node) -> str | None:
        """Return how to train only the steps of a stage that no finished stage has done; None where it must do all."""
        return suggest_continuing(self.pipeline, node, self._artifacts) if node.stage.distributed else None

    @cached_property
    def _newest(self) -> dict[tuple[str, str], Artifact]:
        """By stage kind and name."""
        return {
            # Later artifacts replace earlier ones of the same stage.
            (artifact.record["kind"], artifact.record["stage"]): artifact
            for artifact in self._artifacts
            if artifact.record.get("pipeline") == self.pipeline.name
        }

    def previous(self, node: Node) -> Artifact | None:
        """The newest artifact that this stage made in a run of the same name, or None."""
        return self._newest.get((node.stage.kind, node.name))

    def state(self, node: Node) -> str:
        """Return whether a stage's settings are those of its last finished self, or of another finished stage."""
        last = self.previous(node)
        if last is not None and last.record["key"] == node.key:
            return "unchanged"
        # Runs share stages with equal keys, and a run may return to earlier settings.
        finished = next((artifact for artifact in self._artifacts if artifact.record["key"] == node.key), None)
        if last is None and finished is not None:
            return f"finished as '{finished.stage}' in run '{finished.record.get('pipeline')}'"
        if last is None:
            return "never finished"
        return "changed" if finished is None else "changed, and finished before with these settings"

    def explain(self, node: Node) -> list[str]:
        """Differences between this stage and its last finished self, one line a field; empty when there is none."""
        last = self.previous(node)
        if last is None or last.record["key"] == node.key:
            return []
        # Inputs are recorded by key, and readers know stages by name. Both runs' names are needed.
        names = {artifact["key"]: artifact["stage"] for artifact in last.record["input_stages"]}
        current = {other.key: other.name for other in self.pipeline}
        return list(_differences(last.record["parts"], _as_json(node.parts), "", {**names, **current}))


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


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

    A stage of a loop is named with its round (``dpo-2``); without it ``only`` is the last one, the others every one.
    """
    for option, name in [("--only", only), ("--from", from_), *(("--rebuild", item) for item in rebuild)]:
        if name is not None and pipeline.resolve(name) not in pipeline.nodes:
            known = [*pipeline.nodes, *pipeline.expanded.rounds]
            raise UserError(f"{option} {name}: there is no such stage.{suggest(name, known)}")
    force = {name for item in rebuild for name in pipeline.expanded.every(item)}
    if from_ is not None:
        force.update(pipeline.expanded.every(from_))
        # The pipeline is in order, so one pass reaches everything downstream.
        for node in pipeline:
            if any(name in force for name in node.input_names):
                force.add(node.name)
    if only is not None:
        only = pipeline.resolve(only)
        missing = [
            name
            for name in pipeline.nodes[only].input_names
            if store.find(pipeline.nodes[name].stage.kind, pipeline.nodes[name].key, name) is None
        ]
        if missing:
            raise UserError(
                f"--only {only}: it reads {', '.join(missing)}, not finished yet. Run without --only first."
            )
        # Nothing else runs, so nothing else may count as about to be made.
        force &= {only}
    return force


def stages_to_make(pipeline: Pipeline, store: Store, only: str | None, force: set[str]) -> list[Node]:
    """Return the stages that a run makes, in order: ``only`` that one if given, finished ones only if in ``force``."""
    only = None if only is None else pipeline.resolve(only)
    return [
        node
        for node in pipeline
        if (only is None or node.name == only)
        and (node.name in force or store.find(node.stage.kind, node.key, node.name) is None)
    ]


def check_sources(pipeline: Pipeline, store: Store, used: set[str], strict: bool) -> list[str]:
    """Return warnings for cached stages in ``used`` that other source code made under the same version.

    Raises ``UserError`` for them when ``strict``.
    """
    warnings = []
    for node in pipeline:
        if node.name not in used:
            continue
        artifact = store.find_intact(node.stage.kind, node.key, node.name)
        if artifact is not None and artifact.record.get("source") != source_digest(node.stage):
            warnings.append(node.name)
    if not warnings:
        return []
    text = f"made by other source code under the same stage version: {', '.join(warnings)}"
    if strict:
        raise UserError(f"{text}. `--rebuild {warnings[0]}` makes it again; without --strict it is used as it is.")
    return [f"{text}. They are used as they are; --rebuild STAGE makes one again, --strict refuses them."]
