"""Merge runs that differ only by seed: mean and interval over seeds, and differences between settings. Torch-free.

The unit is a run: one number per seed. A difference between settings is paired by seed if both have the same seeds,
else it is Welch's. P-values are corrected over the table as in a scorecard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from align.errors import UserError
from align.evaluation.comparisons import correct_table
from align.evaluation.statistics import seed_difference, seed_mean
from align.report.compare.merged_scorecard import EvaluatedRun, read_cards
from align.report.compare.run_table import Runs, result_metrics
from align.report.compare.seed_groups import SeedGroup, group_by_seed
from align.report.page.number_format import interval, number
from align.report.scorecard.conclusions import metric_phrase
from align.report.scorecard.decision import Best, Decision, checkpoints, decide

Row = dict[str, Any]


@dataclass
class SeedSystem:
    """A checkpoint of one setting, trained with several seeds; ``values`` has metric → seed → number."""

    label: str
    name: str
    group: SeedGroup
    role: str
    is_subject: bool
    """True for the checkpoint that the setting's runs are about."""
    is_shared: bool
    """True if all seeds use the same weights, such as an imported base model's."""
    values: dict[str, dict[str, float]]


@dataclass
class SeedComparison:
    """Every setting's systems, and their differences over seeds; ``card`` has them as a scorecard would."""

    groups: list[SeedGroup]
    systems: list[SeedSystem]
    metrics: list[str]
    card: dict[str, Any]
    candidates: list[str] = field(default_factory=list)
    """Labels among which the decision is: each setting's subject, or the checkpoints of the only setting."""

    @property
    def seed_counts(self) -> str:
        """Number of seeds of the settings: ``3 seeds``, or ``2 to 5 seeds``."""
        counts = sorted({len(group.runs) for group in self.groups})
        return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"

    @property
    def decision(self) -> Decision | None:
        """The recommended setting, or the recommended checkpoint if there is one setting."""
        return decide(self.card, self.candidates, self._best(), f"over {self.seed_counts}")

    def estimate(self, label: str, metric: str) -> Row | None:
        """Return mean and interval of a system's metric; None if it was not measured."""
        row: Row | None = self.card["estimates"][label].get(metric)
        return row

    def as_rows(self) -> list[Row]:
        """Return each candidate's numbers in the primary metric, JSON-able."""
        primary = self.card["primary"]
        by_label = {system.label: system for system in self.systems}
        return [
            {
                "setting": by_label[label].group.name,
                "system": by_label[label].name,
                "settings": by_label[label].group.settings,
                "metric": primary,
                "runs": by_label[label].group.runs,
                "by_seed": by_label[label].values.get(primary, {}),
                **(self.estimate(label, primary) or {}),
            }
            for label in self.candidates
        ]

    def as_lines(self) -> list[str]:
        """Return each candidate's numbers in the primary metric as a line of text."""
        title = metric_phrase(self.card, self.card["primary"])
        lines = []
        for label, row in zip(self.candidates, self.as_rows(), strict=True):
            seeds = ", ".join(f"{seed}: {number(value)}" for seed, value in row["by_seed"].items())
            bounds = f" (95 % interval {interval(row)})" if row.get("low") is not None else " (no interval)"
            lines.append(f"{label}: {title} {number(row.get('value'))}{bounds}; by seed {seeds}")
        return lines

    def _best(self) -> Best:
        """Return the candidate with the best mean, and the difference of every other one to it."""
        primary = self.card["primary"]
        better = self.card["metrics"][primary]["better"]
        measured = {label: row["value"] for label in self.candidates if (row := self.estimate(label, primary))}
        if better is None or not measured:
            return Best(None, {})
        sign = -1 if better == "lower" else 1
        best = max(measured, key=lambda label: sign * measured[label])
        differences = {}
        for row in self.card["differences"]:
            if row["metric"] != primary or best not in (row["policy"], row["against"]):
                continue
            is_turned = row["policy"] == best
            label = row["against"] if is_turned else row["policy"]
            if label in measured:
                differences[label] = turn(row) if is_turned else row
        return Best(best, differences)


TURNED_VERDICTS = {"better": "worse", "worse": "better", "higher": "lower", "lower": "higher", "unclear": "unclear"}


def turn(row: Mapping[str, Any]) -> Row:
    """Return a difference from the other side."""
    low = None if row["high"] is None else -row["high"]
    high = None if row["low"] is None else -row["low"]
    sides = {"policy": row["against"], "against": row["policy"], "value": -row["value"]}
    return {**row, **sides, "low": low, "high": high, "verdict": TURNED_VERDICTS[row["verdict"]]}


def compare_over_seeds(runs: Runs) -> SeedComparison:
    """Return the runs by setting, with means, intervals and differences over their seeds.

    Raises ``UserError`` for runs without a scorecard, and as :func:`group_by_seed` does.
    """
    groups = group_by_seed(runs)
    evaluated, problems = read_cards(runs)
    if problems:
        listed = "; ".join(f"{run}: {problem}" for run, problem in problems.items())
        raise UserError(f"{listed}. Over seeds, every run needs its numbers: run its evaluation, or leave it out.")
    by_run = {run.name: run for run in evaluated}
    first = evaluated[0].card
    metrics = [name for name in result_metrics(first) if all(name in run.card["metrics"] for run in evaluated)]
    if first["primary"] not in metrics:
        raise UserError(f"'{first['primary']}', the primary metric of {evaluated[0].name}, is missing in other runs.")
    systems = [system for group in groups for system in _systems(group, by_run, metrics, len(groups) > 1)]
    candidates = [system.label for system in systems if system.is_subject]
    if len(groups) == 1:
        trained = checkpoints(first)
        candidates = [system.label for system in systems if system.name in trained]
    card = {
        "primary": first["primary"],
        "metrics": {name: first["metrics"][name] for name in metrics},
        "tasks": first["tasks"],
        "estimates": {system.label: _estimates(system) for system in systems},
        "differences": _differences(systems, candidates, metrics, by_run),
        "systems": [],
        "gates": [],
    }
    roles = {system.label: system.role for system in systems}
    correct_table(card["differences"], roles, card["primary"], card["metrics"])
    return SeedComparison(groups, systems, metrics, card, candidates)


def _systems(
    group: SeedGroup, by_run: Mapping[str, EvaluatedRun], metrics: Sequence[str], with_name: bool
) -> list[SeedSystem]:
    """Return the systems that all runs of a setting measured."""
    runs = {seed: by_run[run] for seed, run in group.runs.items()}
    first = next(iter(runs.values()))
    systems = []
    for entry in first.card["systems"]:
        name = entry["name"]
        if any(name not in run.card["estimates"] for run in runs.values()):
            continue
        keys = {system["key"] for run in runs.values() for system in run.card["systems"] if system["name"] == name}
        systems.append(
            SeedSystem(
                label=f"{group.name}: {name}" if with_name else name,
                name=name,
                group=group,
                role=entry["role"],
                is_subject=name == first.subject,
                is_shared=len(keys) == 1 and len(runs) > 1,
                values={metric: _values_by_seed(runs, name, metric) for metric in metrics},
            )
        )
    return systems


def _values_by_seed(runs: Mapping[str, EvaluatedRun], name: str, metric: str) -> dict[str, float]:
    estimates = {seed: run.card["estimates"][name].get(metric) for seed, run in runs.items()}
    return {seed: row["value"] for seed, row in estimates.items() if row and row["value"] is not None}


def _estimates(system: SeedSystem) -> dict[str, Row]:
    rows = {metric: seed_mean(list(values.values())).as_dict() for metric, values in system.values.items() if values}
    if system.is_shared:
        # The same weights measured again: what varies is the evaluation, not the training.
        return {metric: {**row, "low": None, "high": None} for metric, row in rows.items()}
    return rows


def _differences(
    systems: Sequence[SeedSystem], candidates: Sequence[str], metrics: Sequence[str], by_run: Mapping[str, EvaluatedRun]
) -> list[Row]:
    """Return the differences between candidates, and between each setting's subject and its reference."""
    by_label = {system.label: system for system in systems}
    pairs = [(later, earlier) for earlier, later in combinations(candidates, 2)]
    for system in systems:
        reference = by_run[next(iter(system.group.runs.values()))].card["reference"]
        for rival in systems:
            is_reference = rival.group is system.group and rival.name == reference
            if system.is_subject and is_reference and rival is not system:
                pairs.append((system.label, rival.label))
    rows = []
    # A pair of candidates may also be a subject and its reference.
    for policy, against in {frozenset(pair): pair for pair in pairs}.values():
        for metric in metrics:
            first, second = by_label[policy].values[metric], by_label[against].values[metric]
            difference = seed_difference(first, second)
            if difference is not None:
                rows.append({"policy": policy, "against": against, "metric": metric, **difference.as_dict()})
    return rows
