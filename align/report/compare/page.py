"""Several runs on one page: what was set otherwise, what came of it, where the best trade-offs are.

The same page as that of one run where it can be (scorecard, behavior, samples), with the systems of all runs beside
each other. It needs no network, and nothing on it that a model or a log wrote is markup; see ``page.py``. Beside it lie
the merged ``scorecard.json`` and ``samples.jsonl``, figures and tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.report import scores
from align.report.assets import FIGURES, TABLES, Beside, Figure
from align.report.compare.cards import (
    SAMPLES,
    SCORECARD,
    Card,
    Evaluated,
    merge,
    merge_samples,
    other_items,
    read_cards,
)
from align.report.compare.fields import Runs, cost_rows, run_rows
from align.report.compare.figures import front, overlays, pareto, points
from align.report.curves import Events, read_events
from align.report.escape import script_json
from align.report.figures import Panel
from align.report.page import SHOWN_PANELS, shell, template
from align.report.summary import find, name_of
from align.report.sweep import SweepTrials, sweep_section
from align.report.wording import interval, number, signed
from align.store.artifacts import Artifact, Kind
from align.store.atomic_write import write_text_atomically

MAX_PANELS = 18
SCORES = ("gold", "reward")


def write_comparison(
    runs: Mapping[str, Mapping[str, Artifact]],
    out: Path,
    title: str = "Comparison of runs",
    notes: Mapping[str, str] | None = None,
    sweep: SweepTrials | None = None,
) -> Path:
    """Write the page about ``runs`` (name → artifacts by stage, as ``Run.artifacts`` has them) to ``out``; returns it.

    ``notes`` say of a run what a reader must know: that it failed, that stages are missing. ``sweep`` are the trials
    that the runs come from. Figures and tables go into ``figures`` and ``tables`` in the same folder.
    """
    Panel.made = 0
    beside = Beside()
    out.parent.mkdir(parents=True, exist_ok=True)
    found, problems = read_cards(runs)
    card = merge(found) if found else None
    said = {run: " · ".join(filter(None, ((notes or {}).get(run), problems.get(run)))) for run in runs}
    merged = _write_merged(found, card, out.parent)
    events = {
        run: {stage: read_events(one.path) for stage, one in artifacts.items()} for run, artifacts in runs.items()
    }
    curves, readings, same = _curves(runs, events, beside)
    table = run_rows(runs, found, card, said, beside)
    parts = scores.context(merged, card, _changed_events(runs, events), beside)
    beside.figures[:] = [one for one in beside.figures if one not in parts["drift"]]  # the front has those points
    trade_offs = _trade_offs(found, card, beside)
    html = template("compare.html.jinja").render(
        **shell(title),
        **{**parts, "drift": []},
        sweep=sweep_section(sweep, beside),
        runs=table,
        first=found[0].run if found else "",
        heads=_heads(found, card),
        said=_sentences(found, card, trade_offs),
        trade_offs=[one["figure"] for one in trade_offs],
        other_items=other_items(found),
        curves=curves,
        curves_json=script_json(readings),
        same=same,
        costs=cost_rows(runs, beside),
        folders=(FIGURES, TABLES),
    )
    beside.write(out.parent)
    write_text_atomically(out, html)
    return out


def _write_merged(found: Sequence[Evaluated], card: Card | None, folder: Path) -> list[Artifact]:
    """The merged scorecard and samples as files, which is how the page's parts read them."""
    if card is None:
        for name in (SCORECARD, SAMPLES):  # of an earlier comparison
            (folder / name).unlink(missing_ok=True)
        return []
    (folder / SCORECARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    with (folder / SAMPLES).open("w", encoding="utf-8") as file:
        for line in merge_samples(found):
            file.write(json.dumps(line) + "\n")
    return [Artifact("comparison", Kind.SCORECARD, folder, {})]


def _heads(found: Sequence[Evaluated], card: Card | None) -> list[dict[str, Any]]:
    """One box per run: the decisive number of the checkpoint it is about."""
    heads = []
    for one in found if card is not None else ():
        assert card is not None
        label, first = one.labels[one.subject], found[0].labels[found[0].subject]
        row = find(card, label, first, card["primary"])
        heads.append(
            {
                "run": one.run,
                "subject": one.subject,
                "estimate": card["estimates"][label].get(card["primary"]),
                "difference": row,
                "against": found[0].run,
            }
        )
    return heads


def _sentences(
    found: Sequence[Evaluated], card: Card | None, trade_offs: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """What the comparison showed, in words."""
    if card is None:
        return []
    about = card["metrics"].get(card["primary"], {"title": card["primary"], "better": None})
    lower = about["better"] == "lower"
    known = [
        (estimate["value"], one, estimate)
        for one in found
        if (estimate := card["estimates"][one.labels[one.subject]].get(card["primary"]))
        and estimate["value"] is not None
    ]
    lines = []
    if len(known) > 1:
        value, best, estimate = sorted(known, key=lambda item: item[0] if lower else -item[0])[0]
        place = f"{best.run} comes out first in {name_of(card, card['primary'])}"
        text = f"{place}: {best.subject} {number(value)} (95 % interval {interval(estimate)})."
        lines.append({"kind": "note", "text": text})
    first = found[0]
    for one in found[1:]:
        row = find(card, one.labels[one.subject], first.labels[first.subject], card["primary"])
        if row is not None:
            what = "is not clearly different from" if row["verdict"] == "unclear" else f"is {row['verdict']} than"
            text = f"{one.run} {what} {first.run}: {signed(row['value'])} (95 % interval {interval(row, True)})."
            lines.append({"kind": row["verdict"], "text": text})
    lines += [{"kind": "note", "text": one["text"]} for one in trade_offs]
    return lines


def _trade_offs(found: Sequence[Evaluated], card: Card | None, beside: Beside) -> list[dict[str, Any]]:
    """Figures of score against KL with their front in words; none where KL was not measured."""
    if card is None:
        return []
    run_of = {label: one.run for one in found for name, label in one.labels.items() if label != name}
    references = {_key(one.card, one.card["reference"]) for one in found}
    warning = (
        "" if len(references) == 1 else " Runs measure KL to different references, so compare it within a run only."
    )
    drawn: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    names = [name for name in SCORES if name in card["metrics"]] or [card["primary"]]
    for name in names:
        about = card["metrics"].get(name)
        here = points(card, name, run_of)
        if about is None or len(here) < 2:
            continue
        best = front(here, about["better"])
        rows += [
            {"score": name, "system": one.label, "run": one.run, "kl": one.kl["value"], "value": one.score["value"],
             "best": one in best}
            for one in here
        ]  # fmt: skip
        listed = ", ".join(one.label for one in best)
        caption = (
            f"{about['title']} against KL to {card['reference']}, one point per checkpoint with 95 % intervals. Ringed "
            f"and joined: those that no other beats in both.{warning}"
        )
        figure: Figure = beside.figure(
            f"trade-off-{name}", pareto(here, best, about["title"], card["reference"]), caption
        )
        text = f"Best trade-offs of {name_of(card, name)} and KL: {listed}.{warning}"
        drawn.append({"figure": figure, "text": text})
    if rows:
        columns = {
            "score": "Score",
            "system": "System",
            "run": "Run",
            "kl": "KL",
            "value": "Value",
            "best": "Best trade-off",
        }
        beside.table("trade-offs", "Score against KL", columns, rows)
    return drawn


def _key(card: Card, name: str) -> str:
    return next((str(one["key"]) for one in card["systems"] if one["name"] == name), name)


def _keys(runs: Runs, stage: str) -> set[str]:
    return {str(artifacts[stage].record.get("key")) for artifacts in runs.values() if stage in artifacts}


def _changed_events(runs: Runs, events: Mapping[str, Mapping[str, Events]]) -> dict[str, Events]:
    """Events of the stages that differ, under their run's name; of those that all share, under the stage's own."""
    found: dict[str, Events] = {}
    for run, per in events.items():
        for stage, one in per.items():
            alone = len(_keys(runs, stage)) == 1 and len(runs) > 1
            found.setdefault(stage if alone else f"{run}: {stage}", one)
    return found


def _curves(
    runs: Runs, events: Mapping[str, Mapping[str, Events]], beside: Beside
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Per stage that differs its panels with a line a run, their numbers, and the stages that are the same in all."""
    stages = list(dict.fromkeys(stage for artifacts in runs.values() for stage in artifacts))
    groups: list[dict[str, Any]] = []
    readings: list[dict[str, Any]] = []
    same = []
    for stage in stages:
        having = {run: per[stage] for run, per in events.items() if stage in per}
        if len(having) > 1 and len(_keys(runs, stage)) == 1:
            same.append(stage)
            continue
        drawn, left_out = overlays(having, MAX_PANELS)
        panels = []
        for one in drawn:
            figure = beside.figure(f"curve-{stage}-{one.title}", one.svg, f"{stage}: {one.title}")
            panels.append({"figure": figure, "number": len(readings)})
            readings.append({"stage": stage, **one.reading})
        if panels:
            groups.append({"stage": stage, "first": panels[:SHOWN_PANELS], "more": panels[SHOWN_PANELS:],
                           "left_out": left_out, "averaged": 1})  # fmt: skip
    return groups, readings, same
