"""A stored scorecard as frozen, typed objects, for scripts: ``Scorecard.read(path)``. Torch-free.

The fields equal ``scorecard.json``'s; ``scorecard_builder.py`` explains them and builds the scorecard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from align.config.validation import suggest
from align.errors import UserError, shorten
from align.store.json_files import DamagedFile, parse_object, read_file, validate

FORMAT = 3
"""Version of the schema that ``scorecard_builder.py`` describes."""
SCORECARD = "scorecard.json"
SAMPLES, ITEMS, JUDGMENTS = "samples.jsonl", "items.jsonl", "judgments.jsonl"
"""Files of an evaluation; ``result_files.py`` describes them."""
ProgramDescription = tuple[str | None, str]
"""Direction of a program's metric (``higher``, ``lower``, None for a metric that only informs), and its meaning."""


class _Frozen(BaseModel):
    """Base of the parts; fields that a later minor version adds are no error."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


@dataclass(frozen=True)
class SystemInfo:
    """A compared system: a checkpoint, or a way to use a checkpoint."""

    name: str
    of: str
    """The stage whose checkpoint answers; equals ``name`` for a plain checkpoint."""
    role: Literal["base", "checkpoint", "prompted", "best_of", "again"]
    key: str
    """Digest of everything that its answers depend on: the checkpoint's key, its prompt and examples."""
    system: str = ""
    """Its system message."""
    shots: int = 0
    best_of: int = 1


@dataclass(frozen=True)
class Metric:
    """The description of a metric."""

    title: str
    better: Literal["higher", "lower"] | None
    """The better side, if there is one."""
    unit: str
    meaning: str
    halves: bool = False
    """True for a win rate: 1 for a win, 0 for a loss, 0.5 for a tie."""
    task: str = ""
    """``prompts`` for the prompt set, else the task's name, with which the metric's name begins."""


@cache
def _described_metrics() -> dict[str, dict[str, dict[str, Any]]]:
    content = Path(__file__).with_name("metrics.json").read_text(encoding="utf-8")
    described: dict[str, dict[str, dict[str, Any]]] = json.loads(content)
    return described


def read_metrics(kind: str) -> dict[str, Metric]:
    """Return the metrics of a kind of task in the order shown; ``metrics.json`` describes them."""
    return {name: Metric(**fields) for name, fields in _described_metrics()[kind].items()}


def prompt_set_metric(title: str, better: str | None, unit: str, meaning: str) -> dict[str, Any]:
    """Return the scorecard's description of a metric of the prompt set."""
    return {"title": title, "better": better, "unit": unit, "meaning": meaning, "task": "prompts"}


PROMPT_SET_METRICS = {name: prompt_set_metric(**fields) for name, fields in _described_metrics()["prompts"].items()}
"""Metrics of the prompt set that are not computed by programs; a task describes its own metrics."""


class Estimate(_Frozen):
    """A number with its 95 % interval. A number that is not finite is None."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Items behind the number: prompts, pairs or rows."""
    method: str
    """``bootstrap``, ``wilson``, or what the task computes."""


class Difference(_Frozen):
    """A paired difference ``policy - against`` with its 95 % interval."""

    policy: str
    against: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None
    """Two-sided p-value of this comparison, uncorrected."""
    p_holm: float | None
    """The p-value, corrected for all comparisons of its family (Holm)."""
    test: str
    verdict: Literal["better", "worse", "higher", "lower", "unclear"]


class WinRate(_Frozen):
    """Wins of one system against another by a judge."""

    task: str
    judge: str
    system: str = Field(alias="one")
    against: str = Field(alias="other")
    n: int
    wins: int
    ties: int
    losses: int
    disagreements: int
    """Questions on which the judge contradicts itself once the answers are swapped."""
    win_rate: Estimate
    """Wins and half the ties, as a share of the questions."""


class Gate(_Frozen):
    """A bound on a system's metric, and whether it holds."""

    name: str
    system: str | None
    """None if the gate applies to no compared system."""
    metric: str
    expression: str
    value: float | None
    low: float | None
    high: float | None
    bound: float | None
    level: Literal["error", "warning"]
    passed: bool | None
    """None if a number is missing."""
    clear: bool
    """True for a violation whose complete interval is beyond the bound."""
    text: str


class Flag(_Frozen):
    """A finding that needs attention, such as a regression or answers that no longer end."""

    policy: str
    kind: str
    text: str


class Scorecard(_Frozen):
    """The result of an evaluation: numbers of every system, paired differences, gates and flags."""

    format: int
    reference: str
    """The system that the others are compared with."""
    base: str | None
    """The model before training, if it was compared."""
    primary: str
    """The metric that decides."""
    policies: tuple[str, ...]
    """Names of the systems, in order."""
    systems: tuple[SystemInfo, ...]
    settings: dict[str, Any]
    metrics: dict[str, Metric]
    estimates: dict[str, dict[str, Estimate]]
    """System → metric → estimate."""
    differences: tuple[Difference, ...]
    win_rates: tuple[WinRate, ...] = ()
    reward_models: tuple[dict[str, Any], ...] = ()
    gates: tuple[Gate, ...] = ()
    flags: tuple[Flag, ...] = ()

    @classmethod
    def read(cls, path: str | Path, stage: str = "") -> Self:
        """Load the scorecard of a stage's folder, or a ``scorecard.json``.

        Raises ``UserError`` for a missing or damaged file, and for another version; its remedy names ``stage``.
        """
        file = scorecard_file(path)
        content = read_content(file, stage)
        try:
            return validate(cls, content)
        except DamagedFile as error:
            raise UserError(f"{file}: damaged: it {error}. {_remedy(stage)}") from None

    def estimate(self, system: str, metric: str | None = None) -> Estimate:
        """Return a system's number in a metric, by default the primary one. Raises ``UserError`` if it has none."""
        self._require_system(system)
        name = self._metric(metric)
        estimates = self.estimates.get(system, {})
        if name not in estimates:
            raise UserError(f"scorecard: '{system}' has no '{name}'.{suggest(name, estimates)}")
        return estimates[name]

    def difference(self, policy: str, against: str | None = None, metric: str | None = None) -> Difference:
        """Return ``policy - against`` in a metric, by default the primary one against the reference.

        Raises ``UserError`` for two systems that were not compared in it.
        """
        against = self.reference if against is None else against
        for system in (policy, against):
            self._require_system(system)
        name = self._metric(metric)
        compared = [row for row in self.differences if row.metric == name]
        for row in compared:
            if (row.policy, row.against) == (policy, against):
                return row
        if any((row.policy, row.against) == (against, policy) for row in compared):
            raise UserError(
                f"scorecard: {name} is compared the other way round; ask for difference('{against}', '{policy}')."
            )
        pairs = ", ".join(f"{row.policy} - {row.against}" for row in compared) or "nothing"
        raise UserError(f"scorecard: {policy} and {against} are not compared in {name}. Compared there: {pairs}.")

    @property
    def failed_gates(self) -> tuple[Gate, ...]:
        """The gates that fail a run: level ``error``, and violated or undecided."""
        return tuple(gate for gate in self.gates if gate.level == "error" and gate.passed is not True)

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each estimate: ``system``, ``metric``, ``value``, ``low``, ``high``, ``n``."""
        return [
            {"system": system, "metric": metric, **estimate.model_dump(include={"value", "low", "high", "n"})}
            for system, estimates in self.estimates.items()
            for metric, estimate in estimates.items()
        ]

    def _require_system(self, name: str) -> None:
        _require(name, self.policies, "system")

    def _metric(self, name: str | None) -> str:
        if name is None:
            return self.primary
        _require(name, self.metrics, "metric")
        return name


def scorecard_file(path: str | Path) -> Path:
    """Return the file of the scorecard in a stage's folder; a path that ends with its name stays."""
    file = Path(path)
    return file if file.name == SCORECARD else file / SCORECARD


def read_content(file: Path, stage: str) -> dict[str, Any]:
    """Return a scorecard as plain values. Raises ``UserError`` as ``Scorecard.read`` does, but checks no field."""
    try:
        content = parse_object(read_file(file))
    except DamagedFile as error:
        raise UserError(f"{file}: damaged: it {error}. {_remedy(stage)}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). {_remedy(stage)}") from None
    if content.get("format") != FORMAT:
        version = shorten(repr(content.get("format")))
        raise UserError(f"{file}: it has format {version}, this align reads {FORMAT}. {_remedy(stage)}")
    return content


def _remedy(stage: str) -> str:
    return f"`--rebuild {stage}` makes it again." if stage else "Evaluate again."


def _require(name: str, names: Iterable[str], noun: str) -> None:
    """Raise ``UserError`` for a name that the scorecard does not have."""
    if name not in names:
        raise UserError(f"scorecard: there is no {noun} '{name}'.{suggest(name, names)}")


def program_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return the scores of the prompt set that programs compute, in order; each is called what its function is."""
    return [
        name
        for name, entry in metrics.items()
        if entry["task"] == "prompts" and name not in PROMPT_SET_METRICS and entry["better"] is not None
    ]
