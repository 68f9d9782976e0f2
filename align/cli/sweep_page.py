"""The page of a sweep: its trials in a table, and the best of them compared like any runs. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from align.cli.sweep_table import sentences
from align.store.store import REPORTS, Store

if TYPE_CHECKING:
    from align.sweep.plan import Sweep
    from align.sweep.study import Study

PAGE = "compare.html"
MOST = 16
"""Trials that are compared in full; beyond it lines and boxes could not be told apart."""


def write_page(sweep: Sweep, study: Study, store: Store, folder: Path | None = None) -> Path | None:
    """Write the page, by default to the store's place for the sweep; None where no trial is done yet."""
    from align.cli.run_page import damages, finished, remembered
    from align.report.compare.page import write_comparison
    from align.report.sweep import SweepTrials
    from align.sweep.summary import short_name, trial_rows

    rows = trial_rows(sweep, study)
    known = store.runs()
    shown = [row for row in rows if row.state == "done" and row.run in known][:MOST]
    runs = {row.run: finished(remembered(row.run, known[row.run]), store) for row in shown}
    runs = {name: artifacts for name, artifacts in runs.items() if artifacts}
    if not runs:
        return None
    said = sentences(sweep, rows)
    if len(shown) < sum(row.state == "done" for row in rows):
        said.append(f"Below, the first {len(shown)} of this table are compared in full.")
    trials = SweepTrials(
        [short_name(one.name) for one in sweep.space],
        [{"name": one.name, "better": "higher" if one.higher else "lower"} for one in sweep.objectives],
        [{**asdict(row), "draw": {short_name(name): value for name, value in row.draw.items()}} for row in rows],
        said,
    )
    out = (folder or store.root / REPORTS / sweep.config.name) / PAGE
    notes = {row.run: row.note for row in shown if row.note}
    for name in runs:
        for stage, text in damages(remembered(name, known[name]), store).items():
            notes[name] = " ".join(filter(None, [notes.get(name), f"{stage} is left out: {text}"]))
    return write_comparison(runs, out, title=sweep.config.name, notes=notes, sweep=trials)
