"""A sweep in the terminal: its plan, a line per trial, and the table of results. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.cli.parser import print_json, table_console
from align.errors import printable
from align.pipeline.context import duration
from align.report.page.number_format import interval, number

if TYPE_CHECKING:
    from align.extensions.sweep.plan import Sweep
    from align.extensions.sweep.study import Study, Trial, TrialRecord
    from align.store.store import Store

MAX_CELL = 40
MARKS = {"starts": "▸", "resumes": "▸", "done": "✓", "failed": "✗", "ended early": "·", "taken over": "·"}


# ---- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialRow:
    """A trial: its draw and values by name. ``best`` is True when no other trial beats it."""

    number: int
    run: str
    state: str
    best: bool
    draw: dict[str, Any]
    """Name → number or label, as they were set."""
    values: dict[str, float]
    intervals: dict[str, list[float | None]]
    seconds: float | None
    """Compute time of the stages that this trial ran; cached stages do not count."""
    note: str


def trial_rows(sweep: Sweep, study: Study) -> list[TrialRow]:
    """Return rows of all trials that were begun: unbeaten trials, the other done trials from good to bad, the rest."""
    best = set(study.best())
    rows = [_row(sweep, trial, trial.number in best) for trial in study.trials()]
    first = sweep.objectives[0]

    def order(row: TrialRow) -> tuple[bool, bool, float, int]:
        value = row.values.get(first.name, 0.0)
        return not row.values, not row.best, -value if first.higher else value, row.number

    return sorted(rows, key=order)


def _row(sweep: Sweep, trial: TrialRecord, best: bool) -> TrialRow:
    notes = trial.notes
    names = [objective.name for objective in sweep.objectives]
    gates = notes.get("gates") or []
    note = str(notes.get("error") or (f"gate failed: {gates[0]}" if gates else ""))
    return TrialRow(
        number=trial.number,
        run=sweep.run_name(trial.number),
        state=trial.state,
        best=best,
        draw=_values_set(sweep, trial.draw),
        values=dict(zip(names, trial.values, strict=False)),
        intervals=dict(zip(names, notes.get("intervals") or [], strict=False)),
        seconds=notes.get("seconds"),
        note=note.splitlines()[0] if note else "",
    )


def _values_set(sweep: Sweep, draw: Any) -> dict[str, Any]:
    """Return name → number as it was set, after rounding, or label of the choice."""
    from align.extensions.sweep.config import Choice

    values = {}
    for dimension in sweep.space:
        name = dimension.name
        if name in draw:
            values[name] = draw[name] if isinstance(dimension, Choice) else dimension.changes(draw[name])[name]
    return values


def short_name(name: str) -> str:
    """Return a path without the part that all have."""
    return name.removeprefix("stages.")


# ---- a line per trial -----------------------------------------------------------------------------------------------


def print_trial(sweep: Sweep, study: Study, trial: Trial | TrialRecord, status: str) -> None:
    """Print one line: a trial begins, with its draw, or has ended, with its values."""
    head = f"{MARKS[status]} trial {trial.number} of {study.limit}"
    draw = _draw_text(sweep, trial.draw)
    if status in ("starts", "resumes", "taken over"):
        print(printable(f"{head}  {status}  {draw}"), flush=True)
        return
    row = next(row for row in trial_rows(sweep, study) if row.number == trial.number)
    values = [f"{name} {number(value)}" for name, value in row.values.items()]
    text = "  ".join([*values, *filter(None, [row.note])])
    mark = "  best so far" if row.best and len(sweep.objectives) == 1 else ""
    print(printable(f"{head}  {status}  {text}{mark}  ({draw})"), flush=True)


def print_changes(sweep: Sweep, study: Study, states: dict[int, str], quiet: bool) -> None:
    """Print a line for each trial that others have begun or ended since ``states``, which is updated."""
    for trial in study.trials():
        if len(trial.draw) < len(sweep.space):
            continue  # begun a moment ago: its draw is not complete yet
        if trial.state != states.get(trial.number) and not quiet:
            print_trial(sweep, study, trial, "starts" if trial.state == "unfinished" else trial.state)
        states[trial.number] = trial.state


def _draw_text(sweep: Sweep, draw: Any) -> str:
    parts = []
    for dimension in sweep.space:
        name = dimension.name
        value = draw[name]
        changes = dimension.changes(draw[name])
        if name in changes and not isinstance(changes[name], dict):  # the number or value itself, not its label
            value = changes[name]
        parts.append(f"{short_name(name)}={_cell(value)}")
    return " ".join(parts)


def _cell(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…"


# ---- the table ------------------------------------------------------------------------------------------------------


def print_trials(sweep: Sweep, study: Study, console: Console | None = None) -> None:
    """Print the table of all trials, the best first, and the sentences about it."""
    console = console or table_console()
    rows = trial_rows(sweep, study)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial")
    for dimension in sweep.space:
        table.add_column(_text(short_name(dimension.name)))
    for objective in sweep.objectives:
        direction = "higher" if objective.higher else "lower"
        table.add_column(_text(f"{objective.name} ({direction} is better)"))
    table.add_column("time", justify="right")
    table.add_column("")
    for row in rows:
        cells = [_text(_cell(row.draw.get(dimension.name, ""))) for dimension in sweep.space]
        cells += [_text(_value_text(row, objective.name)) for objective in sweep.objectives]
        state = "" if row.state == "done" else row.state
        note = " ".join(filter(None, (state, row.note)))
        time = "" if row.seconds is None else duration(row.seconds)
        mark = "*" if row.best else " "
        style = "bold" if row.best else ""
        table.add_row(f"{mark} {row.number}", *cells, time, _text(note), style=style)
    console.print(table)
    for line in sentences(sweep, rows):
        console.print(_text(line), soft_wrap=True)


def sentences(sweep: Sweep, rows: list[TrialRow]) -> list[str]:
    """Return the summary of the trials as sentences."""
    done_rows = [row for row in rows if row.state == "done"]
    text = f"{len(done_rows)} trials done"
    for state in ("failed", "ended early", "unfinished"):
        count = sum(row.state == state for row in rows)
        if count:
            text += f", {count} {state}"
    lines = [f"{text}. Time covers only the stages that the trial ran."]
    best = [row for row in rows if row.best]
    if len(sweep.objectives) == 1 and len(best) > 1:
        numbers = ", ".join(str(row.number) for row in best)
        value = number(best[0].values[sweep.objectives[0].name])
        lines.append(f"No trial is best: {numbers} (*) all have {value}.")
    elif len(sweep.objectives) == 1 and best:
        lines.append(f"Best: trial {best[0].number}; its run is {best[0].run}.")
    elif best:
        numbers = ", ".join(str(row.number) for row in best)
        lines.append(f"Best trade-offs (*), which no trial beats in all objectives: {numbers}.")
    if len(done_rows) > 1:
        lines.append(
            "The best of several trials is in part the luckiest: confirm it on prompts that did not choose it."
        )
    return lines


def _value_text(row: TrialRow, name: str) -> str:
    value = row.values.get(name)
    if value is None:
        return ""
    low, high = row.intervals.get(name) or (None, None)
    if low is None or high is None:
        return number(value)
    return f"{number(value)} ({interval({'low': low, 'high': high})})"


# ---- the plan -------------------------------------------------------------------------------------------------------


def print_plan(sweep: Sweep, store: Store, as_json: bool) -> None:
    """Print what the sweep would try, which stages its trials share, and which of those are finished."""
    config = sweep.config
    pipeline = sweep.first
    needed = sweep.needed(pipeline)
    is_cached = {
        name: store.find_intact(pipeline.nodes[name].stage.kind, key, name) is not None
        for name, key in sweep.shared.items()
        if name in needed
    }
    needed_stages = [name for name in pipeline.nodes if name in needed]
    every_trial = [name for name in needed_stages if name not in sweep.shared]
    unneeded = [name for name in pipeline.nodes if name not in needed]
    points = [dimension.points() for dimension in sweep.space]
    combinations = None
    if None not in points:
        combinations = math.prod(len(values) for values in points if values is not None)
    trials = sweep.trial_count()
    if as_json:
        print_json(
            {
                "name": config.name,
                "trials": trials,
                "sampler": config.sampler,
                "combinations": combinations,
                "space": {dimension.name: str(dimension) for dimension in sweep.space},
                "shared": [{"stage": name, "cached": cached} for name, cached in is_cached.items()],
                "every_trial": every_trial,
                "left_out": unneeded,
                "objectives": [objective.name for objective in sweep.objectives],
            }
        )
        return
    print(f"{config.name}: {trials} trials of {config.pipeline}, sampler {config.sampler}")
    width = max(len(dimension.name) for dimension in sweep.space)
    for dimension in sweep.space:
        print(printable(f"  {dimension.name:<{width}}  {dimension}"))
    if combinations is not None:
        print(f"  {combinations:,} combinations in all")
    objectives = [f"{objective.name} ({'higher' if objective.higher else 'lower'})" for objective in sweep.objectives]
    print(f"objectives: {', '.join(objectives)}")
    if config.prune is not None:
        prune = config.prune
        print(f"pruning: {prune.method} on {prune.target} from step {prune.start}")
    for label, names in (
        ("cached", [name for name, cached in is_cached.items() if cached]),
        ("run once for all trials", [name for name, cached in is_cached.items() if not cached]),
        ("run in every trial", every_trial),
        ("left out, since no objective needs it", unneeded),
    ):
        if names:
            print(f"{label}: {', '.join(names)}")


def _text(text: str) -> Text:
    return Text(printable(text))
