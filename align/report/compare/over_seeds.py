"""Runs that differ only by seed: groups by setting, mean and interval over seeds, and differences between settings.

The unit is a run: one number per seed. A difference between settings is paired by seed if both have the same seeds,
else it is Welch's. P-values are corrected over the table as in a scorecard. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from align.errors import UserError
from align.evaluation.comparisons import correct_table
from align.evaluation.statistics import seed_difference, seed_mean
from align.report.compare.merged_scorecard import EvaluatedRun, read_cards
from align.report.compare.run_table import Runs, differing_fields, result_metrics, setting_text, stage_settings
from align.report.page.number_format import interval, number
from align.report.scorecard.conclusions import metric_phrase
from align.report.scorecard.decision import Decision, checkpoints, decide, find_best
from align.store.artifacts import Artifact, Kind

Row = dict[str, Any]

ONLY_SETTING = "all runs"
"""Name of the setting if there is only one."""
MAX_LISTED_FIELDS = 6
"""Fields that an error lists."""


@dataclass
class SeedGroup:
    """The runs of one setting; ``runs`` maps a seed to the name of its run, ``settings`` are the fields that differ."""

    name: str = ONLY_SETTING
    settings: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)


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
        return decide(self.card, self.candidates, find_best(self.card, {}, self.candidates), f"over {self.seed_counts}")

    def estimate(self, label: str, metric: str) -> Row | None:
        """Return mean and interval of a system's metric; None if it was not measured."""
        row: Row | None = self.card["estimates"][label].get(metric)
        return row

    def system(self, label: str) -> SeedSystem:
        """Return the system called ``label``."""
        return next(system for system in self.systems if system.label == label)

    def as_rows(self) -> list[Row]:
        """Return each candidate's numbers in the primary metric, JSON-able."""
        primary = self.card["primary"]
        rows = []
        for system in map(self.system, self.candidates):
            setting = {"setting": system.group.name, "system": system.name, "settings": system.group.settings}
            values = {"metric": primary, "runs": system.group.runs, "by_seed": system.values.get(primary, {})}
            rows.append({**setting, **values, **(self.estimate(system.label, primary) or {})})
        return rows

    def as_lines(self) -> list[str]:
        """Return each candidate's numbers in the primary metric as a line of text."""
        title = metric_phrase(self.card, self.card["primary"])
        lines = []
        for label, row in zip(self.candidates, self.as_rows(), strict=True):
            seeds = ", ".join(f"{seed}: {number(value)}" for seed, value in row["by_seed"].items())
            bounds = f" (95 % interval {interval(row)})" if row.get("low") is not None else " (no interval)"
            lines.append(f"{label}: {title} {number(row.get('value'))}{bounds}; by seed {seeds}")
        return lines


def compare_over_seeds(runs: Runs) -> SeedComparison:
    """Return the runs by setting, with means, intervals and differences over their seeds.

    Raises ``UserError`` for runs without a scorecard, and as :func:`group_by_seed` does.
    """
    groups = group_by_seed(runs)
    evaluated, problems = read_cards(runs)
    if problems:
        listed = "; ".join(f"{run}: {problem}" for run, problem in problems.items())
        raise UserError(f"{listed}. Over seeds, every run needs its numbers: run its evaluation, or omit the run.")
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
    values = {seed: row["value"] for seed, row in estimates.items() if row}
    return {seed: value for seed, value in values.items() if value is not None}


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
            difference = seed_difference(by_label[policy].values[metric], by_label[against].values[metric])
            if difference is not None:
                rows.append({"policy": policy, "against": against, "metric": metric, **difference.as_dict()})
    return rows


# ---- groups -------------------------------------------------------------------------------------------------------


def group_by_seed(runs: Runs) -> list[SeedGroup]:
    """Return the runs by setting, in the order of each setting's first run.

    Raises ``UserError`` if no two runs differ only by their seed, or if two have the same setting and seed.
    """
    settings = {run: _run_settings(artifacts) for run, artifacts in runs.items()}
    seeds = _varying_seeds(runs)
    groups: dict[str, SeedGroup] = {}
    for run, fields in settings.items():
        group = groups.setdefault(json.dumps(fields, sort_keys=True, default=str), SeedGroup())
        if seeds[run] in group.runs:
            raise UserError(
                f"{run} and {group.runs[seeds[run]]} have the same settings and the same seed ({seeds[run]}), so they "
                "are one run; name it once, or run it with another seed: `align run FILE --set seed=1 --set name=…`."
            )
        group.runs[seeds[run]] = run
    differing = differing_fields(settings[next(iter(group.runs.values()))] for group in groups.values())
    if all(len(group.runs) < 2 for group in groups.values()):
        listed = ", ".join(differing[:MAX_LISTED_FIELDS])
        if len(differing) > MAX_LISTED_FIELDS:
            listed += f" and {len(differing) - MAX_LISTED_FIELDS} more fields"
        raise UserError(
            f"no two of these runs differ only by their seed; they also differ in {listed}. Omit `--over seed`, or run "
            "each setting with several seeds: `align run FILE --set seed=1 --set name=…`."
        )
    for group in groups.values():
        fields = settings[next(iter(group.runs.values()))]
        group.settings = {name: fields.get(name) for name in differing}
        if differing:
            group.name = _setting_name(group.settings)
    return list(groups.values())


def _run_settings(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return all settings of a run, ``stage.field`` → value, without its seeds."""
    settings = {}
    for stage, artifact in artifacts.items():
        if artifact.kind != Kind.REPORT:
            for name, value in stage_settings(artifact.record, with_seed=False).items():
                settings[f"{stage}.{name}"] = value
    return settings


def _varying_seeds(runs: Runs) -> dict[str, str]:
    """Return the seed of every run, as text: ``3``, or ``ppo=3, sft=1`` if its stages have different seeds.

    A stage with the same seed in all runs is skipped: it ran once, and the runs share it.
    """
    by_stage: dict[str, dict[str, Any]] = {}
    for run, artifacts in runs.items():
        for stage, artifact in artifacts.items():
            by_stage.setdefault(stage, {})[run] = artifact.record.get("seed")
    varying = {stage: seeds for stage, seeds in by_stage.items() if len(set(seeds.values())) > 1}
    texts = {}
    for run in runs:
        seeds = {stage: by_run[run] for stage, by_run in varying.items() if run in by_run}
        if len(set(seeds.values())) == 1:
            texts[run] = str(next(iter(seeds.values())))
        else:
            texts[run] = ", ".join(f"{stage}={seed}" for stage, seed in seeds.items()) or "the same"
    return texts


def _setting_name(settings: Mapping[str, Any]) -> str:
    """Return a setting's name, ``kl_coef=0.05, learning_rate=1e-05``; a stage only if the field is ambiguous."""
    short = [name.partition(".")[2] for name in settings]
    return ", ".join(
        f"{name if short.count(last) > 1 else last}={setting_text(value)}"
        for (name, value), last in zip(settings.items(), short, strict=True)
    )
