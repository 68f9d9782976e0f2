"""The table of ``training_vs_peers``, out of its runs. Pure.

A ratio is align's value over the peer's in the same round; the table shows the median over the rounds and, of several,
the smallest and the largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.training_peers.results import Run

GIB = 2**30
HEAD = ("work", "side", "tokens/s", "GiB", "command s", "time per token", "memory", "command")


def good_runs(runs: Iterable[Run], work: str, side: str) -> dict[int, Run]:
    """Return round -> run of a side, without those that failed."""
    return {run["round"]: run for run in runs if (run["work"], run["side"]) == (work, side) and "failure" not in run}


def saved_runs(measured: dict[int, Run]) -> dict[int, Run]:
    """Return the runs whose command ended well; only their time is that of a whole command."""
    return {number: run for number, run in measured.items() if "failure_after_training" not in run}


def ratio_cell(ours: dict[int, Run], theirs: dict[int, Run], name: str) -> str:
    """Return the median of align's value over the peer's, with the extremes of several rounds."""
    if name == "seconds":
        theirs = saved_runs(theirs)
    ratios = [ours[number][name] / theirs[number][name] for number in sorted(ours.keys() & theirs.keys())]
    if not ratios:
        return "-"
    middle = f"{statistics.median(ratios):.2f}"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f}-{max(ratios):.2f})"


def table(runs: list[Run], works: Iterable[str], sides: Iterable[str]) -> list[str]:
    """Return the table's lines: a row for each work and side, in Markdown with columns that align."""
    rows = [list(HEAD)]
    names = list(sides)
    for work in works:
        for side in names:
            if any((run["work"], run["side"]) == (work, side) for run in runs):
                rows.append(_row(runs, work, side))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    return [lines[0], f"| {' | '.join('-' * width for width in widths)} |", *lines[1:]]


def _row(runs: list[Run], work: str, side: str) -> list[str]:
    measured = good_runs(runs, work, side)
    if not measured:
        return [work, side, "failed", *["-"] * (len(HEAD) - 3)]
    ours = good_runs(runs, work, "align")
    cells = [
        work,
        side,
        f"{1 / _median(measured, 'seconds_per_token'):.0f}",
        f"{_median(measured, 'peak_bytes') / GIB:.1f}",
        f"{_median(saved_runs(measured), 'seconds'):.0f}" if saved_runs(measured) else "failed",
    ]
    if side == "align":
        return [*cells, "", "", ""]
    return [*cells, *(ratio_cell(ours, measured, name) for name in ("seconds_per_token", "peak_bytes", "seconds"))]


def _median(measured: dict[int, Run], name: str) -> float:
    return float(statistics.median(run[name] for run in measured.values()))


def notes(runs: list[Run], expected_tokens: dict[str, int]) -> list[str]:
    """Return a line for each run that read other tokens than expected, or failed."""
    lines = []
    for run in runs:
        place = f"{run['work']}, {run['side']}, round {run['round'] + 1}"
        if "failure" in run:
            lines.append(f"{place} failed: {run['failure']}")
            continue
        if "failure_after_training" in run:
            lines.append(f"{place} failed after training: {run['failure_after_training']}")
        if run["tokens"] != expected_tokens[run["work"]]:
            lines.append(f"{place} read {run['tokens']} tokens; its rows have {expected_tokens[run['work']]}")
    return lines
