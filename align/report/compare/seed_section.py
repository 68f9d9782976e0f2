"""The page's section about runs over seeds: a row and a figure by setting, every seed's number, all differences."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from align.report.compare.over_seeds import SeedComparison, SeedSystem
from align.report.page.assets import AssetWriter, estimate_cells, estimate_columns
from align.report.page.number_format import difference_text, estimate_text, number, p_value
from align.report.page.panels import COLORS, INK, Panel, legend_name, nth, styled
from align.report.scorecard.conclusions import RELATIONS, evidence, find_difference

POINT_SPREAD = 0.11
"""Height of the band of a setting's points below its mean, in rows."""


def seed_section(seeds: SeedComparison | None, assets: AssetWriter) -> dict[str, Any] | None:
    """Return the section for the template; its tables and its figure are added to the files next to the page."""
    if seeds is None:
        return None
    primary = seeds.card["primary"]
    metrics = seeds.card["metrics"]
    _add_tables(seeds, assets)
    caption = (
        f"{metrics[primary]['title']} of each system: the mean over seeds with its 95 % interval, and below it a point "
        "for each seed."
    )
    columns = list(dict.fromkeys(seed for group in seeds.groups for seed in group.runs))
    by_seed = []
    for system in seeds.systems:
        cells = [number(system.values[primary].get(seed)) for seed in columns]
        by_seed.append({"label": system.label, "cells": cells})
    differences = []
    for row in seeds.card["differences"]:
        title = metrics[row["metric"]]["title"]
        differences.append({**row, **difference_text(row), "title": title, "p_raw": p_value(row["p"])})
    return {
        "has_settings": len(seeds.groups) > 1,
        "counts": seeds.seed_counts,
        "metrics": [{"name": name, **metrics[name]} for name in seeds.metrics],
        "rows": [_row(seeds, system) for system in seeds.systems],
        "figure": assets.add_figure("over-seeds", _seed_plot(seeds), caption),
        "by_seed": {"seeds": columns, "rows": by_seed},
        "differences": differences,
    }


def seed_headlines(seeds: SeedComparison) -> list[dict[str, Any]]:
    """Return a box for each candidate: its mean over seeds, and the difference to the first candidate."""
    primary = seeds.card["primary"]
    has_settings = len(seeds.groups) > 1
    boxes = []
    for label in seeds.candidates:
        system = seeds.system(label)
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
    findings = []
    for row in seeds.card["differences"]:
        if row["metric"] == seeds.card["primary"]:
            relation = f"{row['policy']} {RELATIONS[row['verdict']]} {row['against']}"
            text = f"{relation} over {row['n']} seeds ({row['test']}): {evidence(row)}."
            findings.append({"kind": row["verdict"], "text": text})
    return findings


@styled
def _seed_plot(seeds: SeedComparison) -> Markup:
    """Draw the primary metric of every system: its mean with the interval, and a hollow point for each seed."""
    primary = seeds.card["primary"]
    title = seeds.card["metrics"][primary]["title"]
    systems = [system for system in seeds.systems if system.values[primary]]
    panel = Panel(7.2, 0.9 + 0.4 * max(2, len(systems)))
    groups = [id(group) for group in seeds.groups]
    for y, system in enumerate(systems):
        index = groups.index(id(system.group))
        values = list(system.values[primary].values())
        dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "markerfacecolor": "none"}
        panel.axes.plot(values, [y + 2 * POINT_SPREAD] * len(values), markeredgecolor=nth(COLORS, index), **dots)
        mean = seeds.estimate(system.label, primary)
        panel.add_point(mean, y - POINT_SPREAD, index, capsize=3, linewidth=1.3)
    panel.name_rows([legend_name(system.label) for system in systems])
    panel.axes.set_xlabel(title, color=INK)
    return panel.svg(f"{title} of each system over its seeds")


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
        cell = estimate_text(estimate)
        if estimate is not None and estimate["low"] is None:
            cell["interval"] = "no interval"
        cells.append(cell)
    return {"setting": system.group.name, "system": system.name, "seeds": _seed_words(system), "cells": cells}


def _add_tables(seeds: SeedComparison, assets: AssetWriter) -> None:
    """Add means, every seed's numbers and the differences, unrounded."""
    means = []
    points = []
    for system in seeds.systems:
        about = {"setting": system.group.name, "system": system.name}
        row = {**about, "seeds": len(system.group.runs)}
        for metric in seeds.metrics:
            row |= estimate_cells(metric, seeds.estimate(system.label, metric))
            for seed, value in system.values[metric].items():
                run = system.group.runs[seed]
                points.append({**about, "seed": seed, "run": run, "metric": metric, "value": value})
        means.append(row)
    assets.add_table("over-seeds", means, estimate_columns(seeds.metrics))
    assets.add_table("seeds", points)
    assets.add_table("seed-differences", seeds.card["differences"])
