"""A sweep checked against its pipeline, and its objectives in a finished run. Never imports torch.

Every bound and choice of the search space is tried before anything runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from align.config.validation import suggest
from align.errors import UserError
from align.extensions.sweep.config import (
    Dimension,
    Draw,
    SweepConfig,
    changes_of,
    corner_draws,
    first_draw,
    grid,
    read_space,
)
from align.pipeline.executors import refuse_contradiction
from align.pipeline.pipeline import Node, Pipeline
from align.runner.runner import RECORD_FIELDS, Run
from align.store.artifacts import Artifact, Kind
from align.store.fingerprint import digest

DEFAULT_TRIALS = 20


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, checked against its pipeline."""

    config: SweepConfig
    where: str
    base: Pipeline
    space: list[Dimension]
    objectives: list[Objective]
    shared: dict[str, str]
    """Stage → key, of stages that are the same in all trials."""
    first: Pipeline
    """The pipeline with the first value of every dimension."""

    @classmethod
    def check(
        cls,
        config: SweepConfig,
        where: str,
        assignments: Iterable[str] = (),
        on: str | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> Sweep:
        """Read the pipeline and try every bound and choice, without running anything.

        ``assignments`` are ``--set``'s; ``on`` and ``warn`` are as of ``Pipeline.load``. Raises ``UserError`` with the
        place in the sweep's file.
        """
        base = Pipeline.load(config.pipeline, on=on, warn=warn)
        base = _change(base, config.set, f"{where}: set")
        for text in assignments:
            base = base.set(text)
        refuse_contradiction(base.config.runtime, on)
        space = read_space(config.space, base, where)
        # Only for its errors: a dimension without steps, or too many combinations.
        if config.sampler == "grid":
            grid(space, where)
        first = _change(base, changes_of(space, first_draw(space)), f"{where}: space")
        objectives = [Objective(name, higher) for name, higher in config.objectives]
        for objective in objectives:
            objective.check(first, where)
        _check_prune(config, first, where)
        # A stage whose key is the same at every corner is the same in every trial.
        shared = {node.name: node.key for node in first}
        for changed, draw in corner_draws(space):
            pipeline = _change(base, changes_of(space, draw), f"{where}: space.{changed} = {draw[changed]}")
            keys = {node.name: node.key for node in pipeline}
            shared = {name: key for name, key in shared.items() if keys.get(name) == key}
        return cls(config, where, base, space, objectives, shared, first)

    def parts(self) -> dict[str, Any]:
        """Return what all trials of a study have in common; a change of it needs another study."""
        config = self.config
        return {
            "space": [_describe(dimension) for dimension in self.space],
            "objective": [[objective.name, objective.higher] for objective in self.objectives],
            "pipeline": digest({node.name: node.key for node in self.first}),
            "sampler": [config.sampler, config.seed],
            "pruning": None if config.prune is None else config.prune.model_dump(mode="json"),
        }

    def refuse_other_parts(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """Raise ``UserError`` if a study was begun with other parts; both were read from JSON."""
        changed = [part for part in {**old, **new} if old.get(part) != new.get(part)]
        if "space" in changed and "pipeline" in changed:
            # The pipeline's digest depends on the first values of the space.
            changed.remove("pipeline")
        if changed:
            raise UserError(
                f"the sweep '{self.config.name}' was begun with another {' and another '.join(changed)}, so its trials "
                "cannot be compared. Give this one another name, or start over with --fresh (finished stages are kept)."
            )

    def trial_count(self) -> int:
        """Return the number of trials, retries aside."""
        if self.config.trials:
            return self.config.trials
        return len(grid(self.space, self.where)) if self.config.sampler == "grid" else DEFAULT_TRIALS

    def run_name(self, number: int) -> str:
        """Return the name of a trial's run in the store."""
        return f"{self.config.name}-{number}"

    def pipeline_of(self, draw: Draw, number: int) -> Pipeline:
        """Return the pipeline of one trial, without stages that no objective needs.

        Raises ``UserError`` for a combination that the pipeline refuses.
        """
        # The trial's own name makes it a separate run in the store; names are not part of keys.
        full = self.base.changed({**changes_of(self.space, draw), "name": self.run_name(number)})
        needed = self.needed(full)
        raw = full.plain
        raw["stages"] = {name: block for name, block in raw["stages"].items() if name in needed}
        runtime = raw.get("runtime") or {}
        names = {*raw["stages"], *full.expanded.rounds}
        # Settings for skipped stages would be refused as unknown.
        blocks = {name: block for name, block in (runtime.get("stages") or {}).items() if name in names}
        # Dozens of trials, of which none is continued, would fill the disk with trainers' states.
        raw["runtime"] = {"keep_state": False, **runtime, "stages": blocks}
        return Pipeline(raw, full.where, full.base, full.expanded.rounds)

    def needed(self, pipeline: Pipeline) -> set[str]:
        """Return the stages without which an objective, or the curve of pruning, could not be read."""
        prune = self.config.prune
        # An owner is a stage, or a system that an evaluation compares.
        owners = {pipeline.resolve(objective.owner) for objective in self.objectives}
        if prune is not None:
            owners.add(pipeline.resolve(prune.target.partition(".")[0]))
        needed = {name for name in owners if name in pipeline.nodes}
        # Every evaluation that has an owner among its systems.
        needed |= {node.name for node in pipeline if owners & set(systems_of(node))}
        # And whatever those read.
        queue = list(needed)
        while queue:
            for name in pipeline.nodes[queue.pop()].input_names:
                if name not in needed:
                    needed.add(name)
                    queue.append(name)
        return needed


def _describe(dimension: Dimension) -> list[str]:
    """Return a dimension's name, its text, and a digest of what its bounds or choices set."""
    return [dimension.name, str(dimension), digest([dimension.changes(value) for value in dimension.corners()])]


def _change(pipeline: Pipeline, changes: Mapping[str, Any], place: str) -> Pipeline:
    """Return the pipeline with overrides. Raises ``UserError`` that begins with ``place``."""
    try:
        return pipeline.changed(changes)
    except UserError as error:
        raise UserError(f"{place}: {str(error).removeprefix('--set ')}") from None


def _check_prune(config: SweepConfig, pipeline: Pipeline, where: str) -> None:
    if config.prune is None:
        return
    stage = config.prune.target.partition(".")[0]
    if pipeline.resolve(stage) not in pipeline.nodes:
        names = [*pipeline.nodes, *pipeline.expanded.rounds]
        raise UserError(f"{where}: prune: there is no stage '{stage}'.{suggest(stage, names)}")


SCORECARD = "scorecard.json"


class UndefinedObjective(Exception):
    """The trial measured the objective, but it is no number there."""


@dataclass(frozen=True)
class Measurement:
    """A trial's value of an objective, with its 95 % interval if the scorecard has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Objective:
    """An objective such as ``ppo.gold``. ``higher`` is True if more is better."""

    name: str
    higher: bool

    @property
    def owner(self) -> str:
        """The system or stage."""
        return self.name.partition(".")[0]

    @property
    def metric(self) -> str:
        """The number's name; a task's metric has a dot in its name."""
        return self.name.partition(".")[2]

    def check(self, pipeline: Pipeline, where: str) -> None:
        """Raise ``UserError`` for an owner that is neither a stage nor compared in an evaluation."""
        owner = pipeline.resolve(self.owner)
        names = {*pipeline.nodes, *pipeline.expanded.rounds}
        for node in pipeline:
            names |= set(systems_of(node))
        if owner not in names:
            raise UserError(
                f"{where}: {self.name}: '{self.owner}' is neither a stage nor one of the systems that the pipeline "
                f"evaluates.{suggest(self.owner, names)}"
            )

    def read(self, run: Run, pipeline: Pipeline) -> Measurement:
        """Return the objective's value in a finished run.

        It is read from the last scorecard that has the system and the metric, else from the record of the stage of that
        name. Raises ``UserError`` if neither has it, which would be so in every trial, and ``UndefinedObjective``
        if it is no number.
        """
        owner = pipeline.resolve(self.owner)
        names: set[str] = set()
        # The last evaluation of a pipeline is also the last of its report.
        for artifact in reversed(list(run.artifacts.values())):
            if artifact.kind != Kind.SCORECARD:
                continue
            estimates = _estimates(artifact).get(owner, {})
            names |= set(estimates)
            if self.metric in estimates:
                estimate = estimates[self.metric]
                return Measurement(self._number(estimate["value"]), estimate.get("low"), estimate.get("high"))
        if owner in run.artifacts:
            record = run.artifacts[owner].record
            # No scorecard has it: the record of the stage itself.
            numbers = {**(record.get("metrics") or {}), **{name: record.get(name) for name in RECORD_FIELDS}}
            names |= {name for name, value in numbers.items() if _is_number(value)}
            if self.metric in numbers:
                return Measurement(self._number(numbers[self.metric]))
        raise UserError(f"{self.name}: nothing measures '{self.metric}' of '{owner}'.{suggest(self.metric, names)}")

    def _number(self, value: Any) -> float:
        if not _is_number(value) or not math.isfinite(value):
            raise UndefinedObjective(f"{self.name} is no number there: {value!r}")
        return float(value)


def systems_of(node: Node) -> list[str]:
    """Return the systems that an evaluation compares; none for any other stage."""
    if node.makes != Kind.SCORECARD:
        return []
    return [*getattr(node.config, "policies", ()), *getattr(node.config, "baselines", ())]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _estimates(artifact: Artifact) -> Mapping[str, Mapping[str, Any]]:
    """Return system → metric → estimate of a scorecard; empty if it cannot be read."""
    try:
        card = json.loads((artifact.path / SCORECARD).read_text(encoding="utf-8"))
        estimates: Mapping[str, Mapping[str, Any]] = card["estimates"]
        return estimates
    except (OSError, ValueError, KeyError, TypeError):
        return {}
