"""The page's section about runs over seeds: a row and a figure by setting, every seed's number, all differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from align.report.compare.over_seeds import SeedComparison, SeedSystem
from align.report.page.assets import AssetWriter, estimate_cells, estimate_columns
from align.report.page.number_format import MARKS, MISSING, WORDS, interval, number, p_value, signed
from align.report.page.panels import COLORS, INK, MARKERS, Panel, error_bars, legend_name, nth, styled
from align.report.scorecard.conclusions import RELATIONS, evidence, find_difference

POINT_SPREAD = 0.11
"""Height of the band of a setting's points below its mean, in rows."""
SEED_COLUMNS = {"setting": "Setting", "system": "System", "seed": "Seed", "run": "Run", "metric": "Metric"}
DIFFERENCE_COLUMNS = {
    "policy": "System",
    "against": "Against",
    "metric": "Metric",
    "value": "Difference",
    "low": "95 % low",
    "high": "95 % high",
    "n": "Seeds",
    "p": "p",
    "p_holm": "p (Holm)",
    "test": "Test",
    "verdict": "Verdict",
}


def seed_section(seeds: SeedComparison | None, assets: AssetWriter) -> dict[str, Any] | None:
    """Return the section for the template; its tables and its figure are added to the files next to the page."""
    if seeds is None:
        return None
    primary = seeds.card["primary"]
    _add_tables(seeds, assets)
    metric = seeds.card["metrics"][primary]
    caption = (
        f"{metric['title']} of each system: the mean over seeds with its 95 % interval, and below it a point for each "
        "seed."
    )
    return {
        "has_settings": len(seeds.groups) > 1,
        "counts": seeds.seed_counts,
        "metrics": [{"name": name, **seeds.card["metrics"][name]} for name in seeds.metrics],
        "rows": [_row(seeds, system) for system in seeds.systems],
        "figure": assets.add_figure("over-seeds", seed_plot(seeds), caption),
        "by_seed": _by_seed(seeds),
        "differences": [_difference_row(row, seeds) for row in seeds.card["differences"]],
    }


def seed_headlines(seeds: SeedComparison) -> list[dict[str, Any]]:
    """Return a box for each candidate: its mean over seeds, and the difference to the first one."""
    primary = seeds.card["primary"]
    by_label = {system.label: system for system in seeds.systems}
    boxes = []
    for label in seeds.candidates:
        system = by_label[label]
        has_settings = len(seeds.groups) > 1
        boxes.append(
            {
                "run": system.group.name if has_settings else system.name,
                "subject": f"{system.name}, {_seed_words(system)}" if has_settings else _seed_words(system),
                "estimate": seeds.estimate(label, primary),
                "difference": find_difference(seeds.card, label, seeds.candidates[0], primary),
                "against": seeds.candidates[0].partition(": ")[0],
            }
        )
    return boxes


def seed_findings(seeds: SeedComparison) -> list[dict[str, str]]:
    """Return the differences in the primary metric as sentences; ``kind`` is a verdict."""
    return [
        {
            "kind": row["verdict"],
            "text": f"{row['policy']} {RELATIONS[row['verdict']]} {row['against']} over {row['n']} seeds "
            f"({row['test']}): {evidence(row)}.",
        }
        for row in seeds.card["differences"]
        if row["metric"] == seeds.card["primary"]
    ]


@styled
def seed_plot(seeds: SeedComparison) -> Markup:
    """Draw the primary metric of every system: its mean with the interval, and a hollow point for each seed."""
    primary = seeds.card["primary"]
    systems = [system for system in seeds.systems if system.values[primary]]
    panel = Panel(7.2, 0.9 + 0.4 * max(2, len(systems)))
    groups = [id(group) for group in seeds.groups]
    for y, system in enumerate(systems):
        index = groups.index(id(system.group))
        color = nth(COLORS, index)
        values = list(system.values[primary].values())
        panel.axes.plot(
            values,
            [y + 2 * POINT_SPREAD] * len(values),
            linestyle="none",
            marker="o",
            markersize=4,
            markerfacecolor="none",
            markeredgecolor=color,
        )
        estimate = seeds.estimate(system.label, primary)
        assert estimate is not None
        panel.axes.errorbar(
            estimate["value"],
            y - POINT_SPREAD,
            xerr=error_bars(estimate),
            marker=nth(MARKERS, index),
            color=color,
            markersize=6,
            capsize=3,
            linewidth=1.3,
        )
    panel.name_rows([legend_name(system.label) for system in systems])
    panel.axes.set_xlabel(seeds.card["metrics"][primary]["title"], color=INK)
    return panel.svg(f"{seeds.card['metrics'][primary]['title']} of each system over its seeds")


def _seed_words(system: SeedSystem) -> str:
    """Return a system's number of seeds in words."""
    if system.is_shared:
        return "the same weights in all runs"
    count = len(system.group.runs)
    return f"{count} seed{'' if count == 1 else 's'}"


def _row(seeds: SeedComparison, system: SeedSystem) -> dict[str, Any]:
    cells = []
    for metric in seeds.metrics:
        estimate = seeds.estimate(system.label, metric)
        if estimate is None:
            cells.append({"value": MISSING, "interval": ""})
            continue
        bounds = interval(estimate) if estimate["low"] is not None else "no interval"
        cells.append({"value": number(estimate["value"]), "interval": bounds})
    return {"setting": system.group.name, "system": system.name, "seeds": _seed_words(system), "cells": cells}


def _by_seed(seeds: SeedComparison) -> dict[str, Any]:
    """Return the primary metric of every system (rows) for every seed (columns)."""
    primary = seeds.card["primary"]
    columns = list(dict.fromkeys(seed for group in seeds.groups for seed in group.runs))
    rows = [
        {"label": system.label, "cells": [number(system.values[primary].get(seed)) for seed in columns]}
        for system in seeds.systems
    ]
    return {"seeds": columns, "rows": rows}


def _difference_row(row: Mapping[str, Any], seeds: SeedComparison) -> dict[str, Any]:
    return {
        "title": seeds.card["metrics"][row["metric"]]["title"],
        "policy": row["policy"],
        "against": row["against"],
        "change": signed(row["value"]),
        "interval": interval(dict(row), True),
        "n": row["n"],
        "p_raw": p_value(row["p"]),
        "p": p_value(row["p_holm"]),
        "test": row["test"],
        "verdict": row["verdict"],
        "mark": MARKS[row["verdict"]],
        "words": WORDS[row["verdict"]],
    }


def _add_tables(seeds: SeedComparison, assets: AssetWriter) -> None:
    """Add means, every seed's numbers and the differences, unrounded."""
    columns = {"setting": "Setting", "system": "System", "seeds": "Seeds"}
    for metric in seeds.metrics:
        columns |= estimate_columns(metric, metric)
    means = []
    points = []
    for system in seeds.systems:
        row = {"setting": system.group.name, "system": system.name, "seeds": len(system.group.runs)}
        for metric in seeds.metrics:
            row |= estimate_cells(metric, seeds.estimate(system.label, metric))
            for seed, value in system.values[metric].items():
                run = system.group.runs[seed]
                point = {"setting": system.group.name, "system": system.name, "seed": seed, "run": run}
                points.append({**point, "metric": metric, "value": value})
        means.append(row)
    assets.add_table("over-seeds", "Means over seeds", columns, means)
    assets.add_table("seeds", "Every seed", SEED_COLUMNS | {"value": "Value"}, points)
    assets.add_table("seed-differences", "Differences over seeds", DIFFERENCE_COLUMNS, seeds.card["differences"])
