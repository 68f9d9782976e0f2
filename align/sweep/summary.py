"""What a sweep's trials came to, as plain rows: the best first, then what failed. No torch, no layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from align.sweep.plan import Sweep
from align.sweep.space import Choice
from align.sweep.study import Study, Tried


@dataclass(frozen=True)
class TrialRow:
    """A trial: its draw and values by name, and whether no other beats it."""

    number: int
    run: str
    state: str
    best: bool
    draw: dict[str, Any]
    """Name → number or label, as they were set."""
    values: dict[str, float]
    intervals: dict[str, list[float | None]]
    seconds: float | None
    """Compute of the stages that this trial made; those it found made already are not in it."""
    note: str


def trial_rows(sweep: Sweep, study: Study) -> list[TrialRow]:
    """Rows of all trials that were begun: those that no other beats, the others from good to bad, the rest."""
    best = set(study.best())
    rows = [_row(sweep, one, one.number in best) for one in study.tried()]
    first = sweep.objectives[0]

    def order(row: TrialRow) -> tuple[bool, bool, float, int]:
        value = row.values.get(first.name, 0.0)
        return not row.values, not row.best, -value if first.higher else value, row.number

    return sorted(rows, key=order)


def _row(sweep: Sweep, one: Tried, best: bool) -> TrialRow:
    notes = one.notes
    names = [objective.name for objective in sweep.objectives]
    gates = notes.get("gates") or []
    note = str(notes.get("error") or (f"gate failed: {gates[0]}" if gates else ""))
    return TrialRow(
        number=one.number,
        run=sweep.run_name(one.number),
        state=one.state,
        best=best,
        draw={
            each.name: one.draw[each.name] if isinstance(each, Choice) else each.changes(one.draw[each.name])[each.name]
            for each in sweep.space
            if each.name in one.draw
        },
        values=dict(zip(names, one.values, strict=False)),
        intervals=dict(zip(names, notes.get("intervals") or [], strict=False)),
        seconds=notes.get("seconds"),
        note=note.splitlines()[0] if note else "",
    )


def short_name(name: str) -> str:
    """A path without the part that all have."""
    return name.removeprefix("stages.")


__all__ = ["TrialRow", "short_name", "trial_rows"]
