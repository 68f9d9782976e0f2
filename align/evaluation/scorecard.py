"""From measurements to the scorecard: estimates, paired differences, families, gates, flags.

The schema of ``scorecard.json`` is what :func:`build` returns (format 2):

- ``reference``, ``base`` (or null), ``primary`` (the metric that decides), ``policies`` (every compared system in
  order, ways of prompting and best-of-N included), ``settings``
- ``systems``: list of ``{name, of, role, key, system, shots, best_of}``; role ``base``, ``checkpoint``, ``prompted``,
  ``best_of``, ``again`` (a checkpoint sampled once more)
- ``metrics``: name → ``title``, ``better`` (``higher``, ``lower`` or null), ``unit``, ``meaning``, ``task``. Metrics of
  the prompt set have plain names (task ``prompts``), those of a task ``task.metric``
- ``tasks``: name → ``{title, kind, n, primary, metrics, settings, notes: system → counts}``
- ``estimates``: system → metric → ``{value, low, high, n, method}``; ``n`` counts items (rows for held-out loss)
- ``families``: source of the prompt set → ``{n, estimates: system → metric → estimate}``; ``task_families``: task →
  the same, for tasks of several sources
- ``differences``: list of ``{policy, against, metric, value, low, high, n, p, p_holm, test, verdict}``
- ``family_differences``: the same with ``family``, of the prompt set's primary metric against the reference, corrected
  on their own
- ``copies``: system of role ``again`` → tasks in which it said word for word what its checkpoint did, as greedy answers
  are: the two are not compared there, and nothing says how large the noise is
- ``win_rates``: list of ``{task, judge, one, other, n, wins, ties, losses, disagreements, unreadable, same_answers,
  win_rate, length_controlled}``; of two systems with the same answers throughout the rate has no interval
- ``reward_models``: list of what :func:`align.evaluation.pairs.pair_accuracy` and ``calibration.py`` return, with
  ``stage`` and ``task`` (the pair set)
- ``gates``: list of ``{name, system, metric, expression, value, low, high, bound, level, passed, clear, text}``
- ``flags``: list of ``{policy, kind, text}``; kinds ``regression``, ``over-optimized``, ``eos``, ``length``, ``judge``,
  ``noise``

p-values are corrected (Holm) in three families: the primary metric's comparisons of checkpoints, chosen beforehand; the
primary metric's comparisons with ways of using one without training it; all the others of the table. Verdicts:
``better`` or ``worse`` (``higher`` or ``lower`` for a metric without a good side) when the interval is clear of zero
and the corrected p is below 0.05; else ``unclear``. Torch-free; numbers that are not finite are null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from align.evaluation.comparisons import Column, Resampling, correct, correct_table, difference, estimate, is_rate
from align.evaluation.flags import find_flags
from align.evaluation.gates import Gate, default_gates, evaluate_gates
from align.evaluation.prompt_metrics import METRICS
from align.evaluation.statistics import LEVEL
from align.evaluation.systems import best_of_kl
from align.evaluation.tasks.base import Measured, SystemInfo, Task, Values

FORMAT = 2
FAMILY_METRICS = ("gold", "reward", "length", "finished")
DRIFT = ("kl", "kl_k3")
"""Metrics against the reference itself: a difference of them says nothing new."""
MOST_FAMILIES = 64


@dataclass
class TaskFound:
    """A task and what came out of it, by system."""

    task: Task
    measured: dict[str, Measured]


@dataclass
class Measurements:
    """What was measured, aligned by item.

    ``sources`` is the source of each prompt of the prompt set, ``values[system][metric]`` has one list per prompt, and
    ``heldout[system]`` is (loss per token, tokens) of each held-out row.
    """

    systems: list[SystemInfo]
    reference: str
    base: str | None
    sources: list[str] = field(default_factory=list)
    values: dict[str, dict[str, Values]] = field(default_factory=dict)
    heldout: dict[str, tuple[list[float], list[int]]] = field(default_factory=dict)
    tasks: list[TaskFound] = field(default_factory=list)
    reward_models: list[dict[str, Any]] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    copies: dict[str, list[str]] = field(default_factory=dict)
    """Systems of role ``again`` → tasks (``prompts``: the prompt set) in which they said what their checkpoint did."""

    def is_copy(self, policy: str, against: str, task: str) -> bool:
        """Whether one of two systems said word for word what the other did, because nothing was drawn anew."""
        of = {system.name: system.of for system in self.systems}
        orders = ((policy, against), (against, policy))
        return any(of[again] == first and task in self.copies.get(again, ()) for again, first in orders)

    @property
    def policies(self) -> list[str]:
        """Names of the systems."""
        return [system.name for system in self.systems]


def build(found: Measurements, resampling: Resampling, settings: dict[str, Any]) -> dict[str, Any]:
    """The scorecard of ``found``; see the module's text for its schema."""
    metrics, columns = _columns(found)
    rates = {name for name, per in columns.items() if name not in DRIFT and is_rate(list(per.values()))}
    estimates: dict[str, dict[str, Any]] = {policy: {} for policy in found.policies}
    for name, per in columns.items():
        halves = metrics[name].get("halves", False)
        for policy, column in per.items():
            estimates[policy][name] = estimate(column, name in rates, resampling, halves=halves)
    for one in found.tasks:
        for policy, measured in one.measured.items():
            estimates[policy] |= {f"{one.task.name}.{name}": row for name, row in measured.estimates.items()}
    _bound_best_of(found, estimates)
    primary = choose_primary(metrics, found.tasks)
    differences = [
        {"policy": policy, "against": against, "metric": name, **row}
        for name, per in columns.items()
        if name not in DRIFT
        for policy, against in contrasts(found.systems, found.reference)
        if policy in per and against in per and not found.is_copy(policy, against, metrics[name]["task"])
        if (row := difference(per[policy], per[against], resampling)) is not None
    ]
    correct_table(differences, {one.name: one.role for one in found.systems}, primary, metrics)
    card = {
        "format": FORMAT,
        "reference": found.reference,
        "base": found.base,
        "primary": primary,
        "policies": found.policies,
        "systems": [asdict(system) for system in found.systems],
        "settings": {**settings, "level": LEVEL, "bootstrap": resampling.resamples, "correction": "Holm"},
        "metrics": metrics,
        "tasks": {one.task.name: _about(one) for one in found.tasks},
        "estimates": estimates,
        "differences": differences,
        **_by_source(found, columns, rates, primary, metrics, resampling),
        "copies": found.copies,
        "win_rates": [row for one in found.tasks for row in one.task.extras().get("win_rates", [])],
        "reward_models": found.reward_models
        + [row for one in found.tasks for row in one.task.extras().get("reward_models", [])],
    }
    kinds = {one.task.name: one.task.kind for one in found.tasks}
    gates = [*found.gates, *default_gates(kinds, found.base, found.gates)]
    card["gates"] = evaluate_gates(gates, card)
    card["flags"] = find_flags(card)
    return card


def choose_primary(metrics: Mapping[str, Any], tasks: Sequence[TaskFound]) -> str:
    """The metric that decides: gold, else the reward model's score, else the first task's own."""
    for name in ("gold", "reward"):
        if name in metrics:
            return name
    for one in tasks:
        name = f"{one.task.name}.{one.task.primary}"
        if name in metrics:
            return name
    return "length" if "length" in metrics else next(iter(metrics), "")


def contrasts(systems: Sequence[SystemInfo], reference: str) -> list[tuple[str, str]]:
    """(system, against) that are compared: everything with the base, all but the base with the reference, and every
    trained checkpoint with every way of using one without training.
    """
    base = next((one.name for one in systems if one.role == "base"), None)
    pairs = []
    for one in systems:
        if one.name not in (reference, base):
            pairs.append((one.name, reference))
        if base is not None and one.name != base:
            pairs.append((one.name, base))
        if one.role == "checkpoint" and one.name != reference:
            pairs += [(one.name, other.name) for other in systems if other.role in ("prompted", "best_of")]
    return list(dict.fromkeys(pairs))  # the base may be the reference


# -----------------------------------------------------------------------------------------------------------------


def _columns(found: Measurements) -> tuple[dict[str, Any], dict[str, dict[str, Column]]]:
    """Metrics as the scorecard describes them, and metric → system → its column."""
    columns: dict[str, dict[str, Column]] = {}
    for policy, per in found.values.items():
        for name, values in per.items():
            columns.setdefault(name, {})[policy] = Column(values)
    for policy, (losses, tokens) in found.heldout.items():
        column = Column([[loss] for loss in losses], [float(count) for count in tokens])
        columns.setdefault("heldout_loss", {})[policy] = column
    metrics: dict[str, Any] = {name: dict(about) for name, about in METRICS.items() if name in columns}
    for one in found.tasks:
        for name, metric in one.task.metrics.items():
            per_system = {
                policy: Column(measured.values[name], measured.weights.get(name))
                for policy, measured in one.measured.items()
                if name in measured.values
            }
            if per_system:
                full = f"{one.task.name}.{name}"
                columns[full] = per_system
                metrics[full] = {**asdict(metric), "task": one.task.name}
    return metrics, {name: columns[name] for name in metrics}


def _about(one: TaskFound) -> dict[str, Any]:
    task = one.task
    measured = {name for each in one.measured.values() for name in each.values}
    return {
        "title": task.title,
        "kind": task.kind,
        "n": len(task.items),
        "primary": f"{task.name}.{task.primary}",
        "metrics": [f"{task.name}.{name}" for name in task.metrics if name in measured],
        "settings": task.settings(),
        "notes": {policy: measured.notes for policy, measured in one.measured.items() if measured.notes},
    }


def _bound_best_of(found: Measurements, estimates: dict[str, dict[str, Any]]) -> None:
    """Best of N of the reference: what its KL to it is at most, where KL was measured at all."""
    if "kl" not in estimates[found.reference]:
        return
    for one in found.systems:
        if one.role == "best_of" and one.of == found.reference:
            bound = best_of_kl(one.best_of)
            n = estimates[found.reference]["kl"]["n"]
            estimates[one.name]["kl"] = {"value": bound, "low": None, "high": bound, "n": n, "method": "upper bound"}


def _by_source(
    found: Measurements,
    columns: Mapping[str, Mapping[str, Column]],
    rates: set[str],
    primary: str,
    metrics: Mapping[str, Any],
    resampling: Resampling,
) -> dict[str, Any]:
    """``families``, ``family_differences`` and ``task_families``."""

    def table(groups: Mapping[str, list[int]], names: Sequence[str]) -> dict[str, Any]:
        return {
            source: {
                "n": len(indices),
                "estimates": {
                    policy: {
                        name: estimate(
                            columns[name][policy].at(indices),
                            name in rates,
                            resampling,
                            halves=metrics[name].get("halves", False),
                        )
                        for name in names
                        if policy in columns[name]
                    }
                    for policy in found.policies
                },
            }
            for source, indices in groups.items()
        }

    groups = _group(found.sources)
    shown = [name for name in FAMILY_METRICS if name in columns]
    differences = [
        {"family": family, "policy": policy, "against": against, "metric": primary, **row}
        for family, indices in groups.items()
        for policy, against in contrasts(found.systems, found.reference)
        if primary in shown and found.reference in (policy, against)
        if policy in columns[primary] and against in columns[primary]
        if not found.is_copy(policy, against, metrics[primary]["task"])
        if (row := difference(columns[primary][policy].at(indices), columns[primary][against].at(indices), resampling))
        is not None
    ]
    correct(differences, metrics)
    tasks: dict[str, Any] = {}
    for one in found.tasks:
        sources = _group([item.source for item in one.task.items])
        names = [name for name in metrics if metrics[name]["task"] == one.task.name]
        if names and 1 < len(sources) <= MOST_FAMILIES:
            tasks[one.task.name] = table(sources, names)
    return {"families": table(groups, shown), "family_differences": differences, "task_families": tasks}


def _group(sources: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        groups.setdefault(source, []).append(index)
    return dict(sorted(groups.items()))
