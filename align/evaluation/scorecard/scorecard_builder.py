"""Builds the scorecard from measurements: estimates, paired differences, families, gates, flags.

The schema of ``scorecard.json`` is what :func:`build` returns (format 3):

- ``reference``, ``base`` (or null), ``primary`` (the metric that decides), ``policies`` (every compared system in
  order, prompted and best-of-N ones included), ``settings``
- ``systems``: list of ``{name, of, role, key, system, shots, best_of}``; role ``base``, ``checkpoint``, ``prompted``,
  ``best_of``, ``again`` (a checkpoint sampled once more)
- ``metrics``: name → ``title``, ``better`` (``higher``, ``lower`` or null), ``unit``, ``meaning``, ``task``. Metrics of
  the prompt set have plain names (task ``prompts``), metrics of a task ``task.metric``
- ``tasks``: name → ``{title, kind, n, primary, metrics, settings, notes: system → counts}``
- ``estimates``: system → metric → ``{value, low, high, n, method}``; ``n`` counts items (rows for held-out loss)
- ``families``: source of the prompt set → ``{n, estimates: system → metric → estimate}``; ``task_families``: task →
  the same, for tasks of several sources
- ``differences``: list of ``{policy, against, metric, value, low, high, n, p, p_holm, test, verdict}``
- ``family_differences``: the same with ``family``, of the prompt set's primary metric against the reference, corrected
  separately
- ``copies``: system of role ``again`` → tasks in which it repeats its checkpoint's answers word for word, as greedy
  sampling does: the two are not compared there, and the noise is not measured
- ``win_rates``: list of ``{task, judge, one, other, n, wins, ties, losses, disagreements, unreadable, same_answers,
  win_rate, length_controlled}``; of two systems with the same answers throughout the rate has no interval
- ``reward_models``: list of what :func:`align.evaluation.reward_accuracy.pair_accuracy` and ``calibration.py``
  return, with ``stage`` and ``task`` (the pair set)
- ``gates``: list of ``{name, system, metric, expression, value, low, high, bound, level, passed, clear, text}``
- ``flags``: list of ``{policy, kind, text}``; kinds ``regression``, ``over-optimized``, ``eos``, ``length``, ``judge``,
  ``noise``

p-values are corrected (Holm) in three families: the primary metric's comparisons of checkpoints, chosen beforehand; the
primary metric's comparisons with untrained systems (prompted, best of N); all others of the table. Verdicts:
``better`` or ``worse`` (``higher`` or ``lower`` for a metric without a better side) when the interval is clear of zero
and the corrected p is below 0.05; else ``unclear``. Torch-free; numbers that are not finite are null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from align.config.stages.evaluation.gates import Gate
from align.evaluation.answers import Measured, Values
from align.evaluation.comparisons import Column, Resampling, correct, correct_table, difference, estimate, is_rate
from align.evaluation.scorecard import FORMAT, PROMPT_SET_METRICS, ProgramDescription, SystemInfo, prompt_set_metric
from align.evaluation.scorecard.gates import default_gates, evaluate_gates, find_flags
from align.evaluation.statistics import LEVEL
from align.evaluation.systems import best_of_kl
from align.evaluation.tasks.base import Task

FAMILY_METRICS = ("reward", "length", "finished")
DRIFT = ("kl", "kl_k3")
"""Metrics against the reference itself, whose differences have no information."""
MAX_FAMILIES = 64


@dataclass
class TaskResult:
    """A task and its measurements, by system."""

    task: Task
    measured: dict[str, Measured]


@dataclass
class Measurements:
    """All measurements, aligned by item.

    ``sources`` is the source of each prompt of the prompt set, ``values[system][metric]`` has one list per prompt, and
    ``heldout[system]`` is (loss per token, tokens) of each held-out row.
    """

    systems: list[SystemInfo]
    reference: str
    base: str | None
    sources: list[str] = field(default_factory=list)
    values: dict[str, dict[str, Values]] = field(default_factory=dict)
    programs: dict[str, ProgramDescription] = field(default_factory=dict)
    """Metrics of the prompt set that a program computes → the better direction and the meaning, in order."""
    explanations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Reasons of judges for each response to the prompt set, by system; empty without any."""
    heldout: dict[str, tuple[list[float], list[int]]] = field(default_factory=dict)
    tasks: list[TaskResult] = field(default_factory=list)
    reward_models: list[dict[str, Any]] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    copies: dict[str, list[str]] = field(default_factory=dict)
    """Systems of role ``again`` → tasks (``prompts``: the prompt set) in which they repeat their checkpoint."""

    def is_copy(self, policy: str, against: str, task: str) -> bool:
        """Return True if a system repeats the other word for word, because sampling was greedy."""
        of = {system.name: system.of for system in self.systems}
        orders = ((policy, against), (against, policy))
        return any(of[again] == original and task in self.copies.get(again, ()) for again, original in orders)

    @property
    def policies(self) -> list[str]:
        """Names of the systems."""
        return [system.name for system in self.systems]


def build(measurements: Measurements, resampling: Resampling, settings: dict[str, Any]) -> dict[str, Any]:
    """Build the scorecard; see the module's docstring for its schema."""
    return _Builder(measurements, resampling).build(settings)


class _Builder:
    """Builds one scorecard."""

    def __init__(self, measurements: Measurements, resampling: Resampling) -> None:
        self.measurements = measurements
        self.resampling = resampling
        self.metrics, self.columns = _columns(measurements)
        self.primary = choose_primary(self.metrics, measurements)
        self.rates = {
            name for name, by_policy in self.columns.items() if name not in DRIFT and is_rate(list(by_policy.values()))
        }
        """Metrics whose values are all 0 or 1."""
        self.contrasts = contrasts(measurements.systems, measurements.reference)

    def build(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the scorecard."""
        measurements = self.measurements
        resampling = self.resampling
        estimates = self._estimates()
        differences = self._differences()
        roles = {system.name: system.role for system in measurements.systems}
        # Verdicts come after the correction, which needs the p-values of the full table.
        correct_table(differences, roles, self.primary, self.metrics)
        extras = [result.task.extras() for result in measurements.tasks]
        card = {
            "format": FORMAT,
            "reference": measurements.reference,
            "base": measurements.base,
            "primary": self.primary,
            "policies": measurements.policies,
            "systems": [asdict(system) for system in measurements.systems],
            "settings": {**settings, "level": LEVEL, "bootstrap": resampling.resamples, "correction": "Holm"},
            "metrics": self.metrics,
            "tasks": {result.task.name: _task_entry(result) for result in measurements.tasks},
            "estimates": estimates,
            "differences": differences,
            **self._by_source(),
            "copies": measurements.copies,
            "win_rates": [row for extra in extras for row in extra.get("win_rates", [])],
            "reward_models": measurements.reward_models
            + [row for extra in extras for row in extra.get("reward_models", [])],
        }
        kinds = {result.task.name: result.task.kind for result in measurements.tasks}
        # Gates and flags read the finished card, so they come last.
        gates = [*measurements.gates, *default_gates(kinds, measurements.base, measurements.gates)]
        card["gates"] = evaluate_gates(gates, card)
        card["flags"] = find_flags(card)
        return card

    def _estimate(self, name: str, column: Column) -> dict[str, Any]:
        halves = self.metrics[name].get("halves", False)
        return estimate(column, name in self.rates, self.resampling, halves=halves)

    def _estimates(self) -> dict[str, dict[str, Any]]:
        """Return system → metric → estimate; a task's own estimates replace the estimates of its values."""
        estimates: dict[str, dict[str, Any]] = {policy: {} for policy in self.measurements.policies}
        for name, by_policy in self.columns.items():
            for policy, column in by_policy.items():
                estimates[policy][name] = self._estimate(name, column)
        for result in self.measurements.tasks:
            for policy, measured in result.measured.items():
                estimates[policy] |= {f"{result.task.name}.{name}": row for name, row in measured.estimates.items()}
        _bound_best_of(self.measurements, estimates)
        return estimates

    def _differences(self) -> list[dict[str, Any]]:
        """Return the paired differences of all contrasts in all metrics, still without verdicts."""
        rows = []
        for name in self.columns:
            if name in DRIFT:
                continue
            for policy, against in self.contrasts:
                row = self._difference(name, policy, against)
                if row is not None:
                    rows.append({"policy": policy, "against": against, "metric": name, **row})
        return rows

    def _difference(
        self, name: str, policy: str, against: str, indices: Sequence[int] | None = None
    ) -> dict[str, Any] | None:
        """Return ``policy - against`` in a metric, over all items or over ``indices``.

        None if a system has no such numbers, or if one system repeats the other word for word.
        """
        by_policy = self.columns[name]
        if policy not in by_policy or against not in by_policy:
            return None
        # A copy gives the same answers: its differences are 0 by construction, which is no evidence of equality.
        if self.measurements.is_copy(policy, against, self.metrics[name]["task"]):
            return None
        first = by_policy[policy]
        second = by_policy[against]
        if indices is not None:
            first = first.at(indices)
            second = second.at(indices)
        return difference(first, second, self.resampling)

    def _by_source(self) -> dict[str, Any]:
        """Return ``families``, ``family_differences`` and ``task_families``."""
        measurements = self.measurements
        groups = _group(measurements.sources)
        names = [name for name in (*measurements.programs, *FAMILY_METRICS) if name in self.columns]
        differences = self._family_differences(groups) if self.primary in names else []
        # Correct these differences separately, so a look at single sources costs the main table no power.
        correct(differences, self.metrics)
        tasks: dict[str, Any] = {}
        for result in measurements.tasks:
            task_groups = _group([item.source for item in result.task.items])
            task_metrics = [name for name, metric in self.metrics.items() if metric["task"] == result.task.name]
            if task_metrics and 1 < len(task_groups) <= MAX_FAMILIES:
                tasks[result.task.name] = self._table(task_groups, task_metrics)
        return {"families": self._table(groups, names), "family_differences": differences, "task_families": tasks}

    def _table(self, groups: Mapping[str, list[int]], names: Sequence[str]) -> dict[str, Any]:
        """Return source → number of items, and its estimates by system and metric."""
        table = {}
        for source, indices in groups.items():
            estimates: dict[str, dict[str, Any]] = {policy: {} for policy in self.measurements.policies}
            for policy, row in estimates.items():
                for name in names:
                    if policy in self.columns[name]:
                        row[name] = self._estimate(name, self.columns[name][policy].at(indices))
            table[source] = {"n": len(indices), "estimates": estimates}
        return table

    def _family_differences(self, groups: Mapping[str, list[int]]) -> list[dict[str, Any]]:
        """Return the primary metric's differences from the reference in each source, still without verdicts."""
        rows = []
        for family, indices in groups.items():
            for policy, against in self.contrasts:
                if self.measurements.reference not in (policy, against):
                    continue
                row = self._difference(self.primary, policy, against, indices)
                if row is not None:
                    keys = {"family": family, "policy": policy, "against": against, "metric": self.primary}
                    rows.append({**keys, **row})
        return rows


def choose_primary(metrics: Mapping[str, Any], measurements: Measurements) -> str:
    """Return the metric that decides: the first program's, else the reward model's, else the first task's primary."""
    for name in (*measurements.programs, "reward"):
        if name in metrics:
            return name
    for result in measurements.tasks:
        name = f"{result.task.name}.{result.task.primary}"
        if name in metrics:
            return name
    return "length" if "length" in metrics else next(iter(metrics), "")


def contrasts(systems: Sequence[SystemInfo], reference: str) -> list[tuple[str, str]]:
    """Return the compared pairs (system, against).

    Every system is compared with the base, every system but the base with the reference, and every trained checkpoint
    with every untrained system (prompted, best of N).
    """
    # The order of the pairs is the order of the scorecard's table.
    base = next((system.name for system in systems if system.role == "base"), None)
    untrained = [system.name for system in systems if system.role in ("prompted", "best_of")]
    pairs = []
    for system in systems:
        if system.name not in (reference, base):
            pairs.append((system.name, reference))
        if base is not None and system.name != base:
            pairs.append((system.name, base))
        if system.role == "checkpoint" and system.name != reference:
            pairs += [(system.name, name) for name in untrained]
    return list(dict.fromkeys(pairs))  # the base may be the reference


def _columns(measurements: Measurements) -> tuple[dict[str, Any], dict[str, dict[str, Column]]]:
    """Return the metrics as the scorecard describes them, and metric → system → its column."""
    columns: dict[str, dict[str, Column]] = {}
    for policy, metric_values in measurements.values.items():
        for name, values in metric_values.items():
            columns.setdefault(name, {})[policy] = Column(values)
    for policy, (losses, tokens) in measurements.heldout.items():
        # Weight the losses by tokens, so the estimate is the loss per token over all rows.
        column = Column([[loss] for loss in losses], [float(count) for count in tokens])
        columns.setdefault("heldout_loss", {})[policy] = column
    # The order of the scorecard: programs, the prompt set's own metrics, then the tasks' metrics.
    entries = {
        name: prompt_set_metric(name, better, "score", meaning)
        for name, (better, meaning) in measurements.programs.items()
    }
    entries |= PROMPT_SET_METRICS
    metrics: dict[str, Any] = {name: dict(entry) for name, entry in entries.items() if name in columns}
    for result in measurements.tasks:
        for name, metric in result.task.metrics.items():
            by_policy = {
                policy: Column(measured.values[name], measured.weights.get(name))
                for policy, measured in result.measured.items()
                if name in measured.values
            }
            if by_policy:
                full_name = f"{result.task.name}.{name}"
                columns[full_name] = by_policy
                metrics[full_name] = {**asdict(metric), "task": result.task.name}
    return metrics, {name: columns[name] for name in metrics}


def _task_entry(result: TaskResult) -> dict[str, Any]:
    task = result.task
    measured_names = {name for measured in result.measured.values() for name in measured.values}
    return {
        "title": task.title,
        "kind": task.kind,
        "n": len(task.items),
        "primary": f"{task.name}.{task.primary}",
        "metrics": [f"{task.name}.{name}" for name in task.metrics if name in measured_names],
        "settings": task.settings(),
        "notes": {policy: measured.notes for policy, measured in result.measured.items() if measured.notes},
    }


def _bound_best_of(measurements: Measurements, estimates: dict[str, dict[str, Any]]) -> None:
    """Add the upper bound of the KL of the reference's best-of-N systems, if KL was measured at all."""
    reference = measurements.reference
    if "kl" not in estimates[reference]:
        return
    n = estimates[reference]["kl"]["n"]
    for system in measurements.systems:
        if system.role == "best_of" and system.of == reference:
            # Best of N has no log-probabilities, but its KL from the sampled policy has a closed bound.
            bound = best_of_kl(system.best_of)
            row = {"value": bound, "low": None, "high": bound, "n": n, "method": "upper bound"}
            estimates[system.name]["kl"] = row


def _group(sources: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        groups.setdefault(source, []).append(index)
    return dict(sorted(groups.items()))
