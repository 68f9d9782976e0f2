"""Group runs by setting: runs that differ only by their seed belong together. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.errors import UserError
from align.report.compare.run_table import Runs, setting_text, stage_settings
from align.store.artifacts import Artifact, Kind

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
    differing = _differing_fields([settings[next(iter(group.runs.values()))] for group in groups.values()])
    if all(len(group.runs) < 2 for group in groups.values()):
        raise UserError(
            f"no two of these runs differ by their seed alone; they also differ in {_list_fields(differing)}. "
            "Leave out `--over seed`, or run each setting with several seeds: "
            "`align run FILE --set seed=1 --set name=…`."
        )
    for group in groups.values():
        fields = settings[next(iter(group.runs.values()))]
        group.settings = {name: fields.get(name) for name in differing}
        if differing:
            group.name = _setting_name(group.settings)
    return list(groups.values())


def _run_settings(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return all settings of a run, ``stage.field`` → value, without its seeds."""
    return {
        f"{stage}.{name}": value
        for stage, artifact in artifacts.items()
        if artifact.kind != Kind.REPORT
        for name, value in stage_settings(artifact.record, with_seed=False).items()
    }


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


def _differing_fields(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for fields in settings for name in fields)
    return [
        name
        for name in names
        if len({json.dumps(fields.get(name), sort_keys=True, default=str) for fields in settings}) > 1
    ]


def _setting_name(settings: Mapping[str, Any]) -> str:
    """Return a setting's name, ``kl_coef=0.05, learning_rate=1e-05``; a stage only if the field is ambiguous."""
    short = [name.partition(".")[2] for name in settings]
    return ", ".join(
        f"{name if short.count(last) > 1 else last}={setting_text(value)}"
        for (name, value), last in zip(settings.items(), short, strict=True)
    )


def _list_fields(names: Sequence[str]) -> str:
    listed = ", ".join(names[:MAX_LISTED_FIELDS])
    more = len(names) - MAX_LISTED_FIELDS
    return listed + (f" and {more} more fields" if more > 0 else "")
