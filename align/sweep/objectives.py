"""Objectives of a sweep: numbers of the scorecard, or of a stage's record. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.config.validation import suggest
from align.errors import UserError
from align.pipeline.pipeline import Node, Pipeline
from align.runner.results import RECORD_FIELDS
from align.runner.runner import Run
from align.store.artifacts import Artifact, Kind

SCORECARD = "scorecard.json"


class UndefinedObjective(Exception):
    """The trial measured the objective, but it is no number there."""


@dataclass(frozen=True)
class Measurement:
    """A trial's value of an objective, with its 95 % interval where the scorecard has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Objective:
    """An objective such as ``ppo.gold``. ``higher`` is True where more is better."""

    name: str
    higher: bool

    @property
    def owner(self) -> str:
        """The system or stage."""
        return self.name.partition(".")[0]

    @property
    def metric(self) -> str:
        """The number's name; that of a task's metric has a dot in it."""
        return self.name.partition(".")[2]

    def check(self, pipeline: Pipeline, where: str) -> None:
        """Raise ``UserError`` for an owner that is neither a stage nor compared in an evaluation."""
        owner = pipeline.resolve(self.owner)
        known = {*pipeline.nodes, *pipeline.expanded.rounds}
        for node in pipeline:
            known |= set(systems_of(node))
        if owner not in known:
            raise UserError(
                f"{where}: {self.name}: '{self.owner}' is neither a stage nor one of the systems that the pipeline "
                f"evaluates.{suggest(self.owner, known)}"
            )

    def read(self, run: Run, pipeline: Pipeline) -> Measurement:
        """Return the objective's value in a finished run.

        It is read from the last scorecard that has the system and the metric, else from the record of the stage of that
        name. Raises ``UserError`` where neither has it, which would be so in every trial, and ``UndefinedObjective``
        where it is no number.
        """
        owner = pipeline.resolve(self.owner)
        known: set[str] = set()
        # The last evaluation of a pipeline is the one that its report ends with.
        for artifact in reversed(list(run.artifacts.values())):
            if artifact.kind != Kind.SCORECARD:
                continue
            estimates = _estimates(artifact).get(owner, {})
            known |= set(estimates)
            if self.metric in estimates:
                estimate = estimates[self.metric]
                return Measurement(self._number(estimate["value"]), estimate.get("low"), estimate.get("high"))
        if owner in run.artifacts:
            record = run.artifacts[owner].record
            # No scorecard has it: the record of the stage itself.
            numbers = {**(record.get("metrics") or {}), **{name: record.get(name) for name in RECORD_FIELDS}}
            known |= {name for name, value in numbers.items() if _is_number(value)}
            if self.metric in numbers:
                return Measurement(self._number(numbers[self.metric]))
        raise UserError(f"{self.name}: nothing measures '{self.metric}' of '{owner}'.{suggest(self.metric, known)}")

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
    """Return system → metric → estimate of a scorecard; empty where it cannot be read."""
    try:
        card = json.loads((artifact.path / SCORECARD).read_text(encoding="utf-8"))
        estimates: Mapping[str, Mapping[str, Any]] = card["estimates"]
        return estimates
    except (OSError, ValueError, KeyError, TypeError):
        return {}


__all__ = ["Measurement", "Objective", "UndefinedObjective", "systems_of"]
