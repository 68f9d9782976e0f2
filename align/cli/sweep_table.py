"""A sweep in the terminal: what it would try, a line a trial, and the table of what came of it. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.cli.console import duration, printable
from align.cli.parser import print_json
from align.report.wording import interval, number

if TYPE_CHECKING:
    from align.store.store import Store
    from align.sweep.plan import Sweep
    from align.sweep.study import Study, Trial, Tried
    from align.sweep.summary import TrialRow

PLAIN_WIDTH = 400
"""Columns where nobody watches: a table in a file is not folded."""
LONGEST = 40
MARKS = {"starts": "▸", "resumes": "▸", "done": "✓", "failed": "✗", "ended early": "·", "taken over": "·"}


def say_trial(sweep: Sweep, study: Study, trial: Trial | Tried, how: str) -> None:
    """One line: a trial begins, with what it sets, or has ended, with what it came to."""
    head = f"{MARKS[how]} trial {trial.number} of {study.limit}"
    drawn = _drawn(sweep, trial.draw)
    if how in ("starts", "resumes", "taken over"):
        print(printable(f"{head}  {how}  {drawn}"), flush=True)
        return
    from align.sweep.summary import trial_rows

    row = next(one for one in trial_rows(sweep, study) if one.number == trial.number)
    text = "  ".join([*(f"{name} {number(value)}" for name, value in row.values.items()), *filter(None, [row.note])])
    mark = "  best so far" if row.best and len(sweep.objectives) == 1 else ""
    print(printable(f"{head}  {how}  {text}{mark}  ({drawn})"), flush=True)


def say_changes(sweep: Sweep, study: Study, states: dict[int, str], quiet: bool) -> None:
    """A line for each trial that others have begun or ended since ``states``, which is brought up to date."""
    for trial in study.tried():
        if len(trial.draw) < len(sweep.space):
            continue  # begun a moment ago: what it sets is not all written yet
        if trial.state != states.get(trial.number) and not quiet:
            say_trial(sweep, study, trial, "starts" if trial.state == "unfinished" else trial.state)
        states[trial.number] = trial.state


def _drawn(sweep: Sweep, draw: Any) -> str:
    from align.sweep.summary import short_name

    shown = []
    for one in sweep.space:
        changes = one.changes(draw[one.name])
        value = changes[one.name] if one.name in changes and not isinstance(changes[one.name], dict) else draw[one.name]
        shown.append(f"{short_name(one.name)}={_cell(value)}")
    return " ".join(shown)


def _cell(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def print_trials(sweep: Sweep, study: Study, console: Console | None = None) -> None:
    """The table of all trials, the best first, and what a reader must know of it."""
    from align.sweep.summary import short_name, trial_rows

    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=PLAIN_WIDTH)
    rows = trial_rows(sweep, study)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial")
    for one in sweep.space:
        table.add_column(_text(short_name(one.name)))
    for objective in sweep.objectives:
        table.add_column(_text(f"{objective.name} ({'higher' if objective.higher else 'lower'} is better)"))
    table.add_column("time", justify="right")
    table.add_column("")
    for row in rows:
        cells = [_text(_cell(row.draw.get(one.name, ""))) for one in sweep.space]
        cells += [_text(_value(row, objective.name)) for objective in sweep.objectives]
        state = " ".join(filter(None, ("" if row.state == "done" else row.state, row.note)))
        time = "" if row.seconds is None else duration(row.seconds)
        table.add_row(
            f"{'*' if row.best else ' '} {row.number}", *cells, time, _text(state), style="bold" if row.best else ""
        )
    console.print(table)
    for line in sentences(sweep, rows):
        console.print(_text(line), soft_wrap=True)


def sentences(sweep: Sweep, rows: list[TrialRow]) -> list[str]:
    """What the trials say together."""
    done = [row for row in rows if row.state == "done"]
    counts = {
        state: n for state in ("failed", "ended early", "unfinished") if (n := sum(r.state == state for r in rows))
    }
    others = "".join(f", {n} {state}" for state, n in counts.items())
    lines = [f"{len(done)} trials done{others}. Time is of the stages that a trial made itself."]
    best = [row for row in rows if row.best]
    if len(sweep.objectives) == 1 and best:
        lines.append(f"Best: trial {best[0].number}; its run is {best[0].run}.")
    elif best:
        listed = ", ".join(str(row.number) for row in best)
        lines.append(f"Best trade-offs (*), which no trial beats in all objectives: {listed}.")
    if len(done) > 1:
        lines.append(
            "The best of several trials is in part the luckiest: confirm it on prompts that did not choose it."
        )
    return lines


def _value(row: TrialRow, name: str) -> str:
    value = row.values.get(name)
    if value is None:
        return ""
    low, high = row.intervals.get(name) or (None, None)
    return number(value) + (
        f" ({interval({'low': low, 'high': high})})" if low is not None and high is not None else ""
    )


def print_plan(sweep: Sweep, store: Store, as_json: bool) -> None:
    """What the sweep would try, what its trials share, and what of that is finished."""
    from align.sweep.space import grid
    from align.sweep.study import DEFAULT_TRIALS

    config = sweep.config
    points = [one.points() for one in sweep.space]
    combinations = math.prod(len(each) for each in points if each is not None) if None not in points else None
    trials = config.trials or (len(grid(sweep.space, sweep.where)) if config.sampler == "grid" else DEFAULT_TRIALS)
    pipeline = sweep.first
    shared = []
    for name, key in sweep.shared.items():
        node = pipeline.nodes[name]
        shared.append({"stage": name, "cached": store.find_intact(node.stage.kind, key, name) is not None})
    needed = sweep.needed(pipeline)
    shared = [one for one in shared if one["stage"] in needed]
    own = [name for name in pipeline.nodes if name not in sweep.shared and name in needed]
    spare = [name for name in pipeline.nodes if name not in needed]
    if as_json:
        print_json({
            "name": config.name, "trials": trials, "sampler": config.sampler, "combinations": combinations,
            "space": {one.name: str(one) for one in sweep.space}, "shared": shared, "every_trial": own,
            "left_out": spare, "objectives": [one.name for one in sweep.objectives],
        })  # fmt: skip
        return
    print(f"{config.name}: {trials} trials of {config.pipeline}, sampler {config.sampler}")
    width = max(len(one.name) for one in sweep.space)
    for one in sweep.space:
        print(printable(f"  {one.name:<{width}}  {one}"))
    if combinations is not None:
        print(f"  {combinations:,} combinations in all")
    print("decides: " + ", ".join(f"{one.name} ({'higher' if one.higher else 'lower'})" for one in sweep.objectives))
    if config.prune is not None:
        curve = config.prune.maximize or config.prune.minimize
        print(f"ends trials early: {config.prune.method} on {curve} from step {config.prune.start}")
    cached = [str(one["stage"]) for one in shared if one["cached"]]
    once = [str(one["stage"]) for one in shared if not one["cached"]]
    for what, names in (
        ("cached", cached),
        ("made once for all trials", once),
        ("made in every trial", own),
        ("left out, since nothing that decides needs it", spare),
    ):
        if names:
            print(f"{what}: {', '.join(names)}")


def _text(text: str) -> Text:
    return Text(printable(text))
