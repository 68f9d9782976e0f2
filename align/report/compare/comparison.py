"""Writes the page that compares several runs: changed settings, results, and the best trade-offs.

It shares its sections with the page of one run (scorecard, behavior, samples), with the systems of all runs side by
side. Like that page it needs no network, and text that a model or a log wrote never becomes markup. The merged
``scorecard.json`` and ``samples.jsonl``, figures and tables are next to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.report.compare.merged_scorecard import (
    SAMPLES,
    SCORECARD,
    Card,
    EvaluatedRun,
    comparable_columns,
    differing_item_counts,
    differing_prompts,
    merge,
    merge_samples,
    read_cards,
)
from align.report.compare.over_seeds import SeedComparison
from align.report.compare.run_table import Runs, SweepTrials, cost_rows, run_table, sweep_section
from align.report.compare.seed_section import seed_findings, seed_headlines, seed_section
from align.report.compare.trade_offs import find_trade_offs, kl_gaps
from align.report.page.assets import FIGURES, TABLES, AssetWriter
from align.report.page.curve_panels import MAX_PANELS, CurveSections, run_curves
from align.report.page.metric_series import Events, read_events
from align.report.page.number_format import interval, signed
from align.report.page.panels import Panel
from align.report.page.templates import load_template, page_shell, script_json
from align.report.scorecard.conclusions import find_difference, group_findings
from align.report.scorecard.decision import decide_by_items
from align.report.scorecard.sections import evaluation_sections
from align.store.artifacts import Artifact, Kind
from align.store.json_files import write_text_atomically

MAX_RUNS = 21
"""Runs in the panels of a stage; the names of more would not fit next to the axes."""


def write_comparison(
    runs: Mapping[str, Mapping[str, Artifact]],
    out: Path,
    title: str = "Comparison of runs",
    notes: Mapping[str, str] | None = None,
    *,
    sweep: SweepTrials | None = None,
    seeds: SeedComparison | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Path:
    """Write the page about ``runs`` (name → artifacts by stage, as in ``Run.artifacts``) to ``out`` and return ``out``.

    ``notes`` warn about single runs: that one failed, that stages are missing. ``sweep`` are the trials that the runs
    come from. ``seeds`` are the same runs over their seeds, from ``compare_over_seeds``, about which the page then is.
    ``warn`` gets a line for each KL that differs by two orders of magnitude between runs.
    Figures and tables go into ``figures`` and ``tables`` in the same folder.
    """
    Panel.start_page()
    assets = AssetWriter()
    out.parent.mkdir(parents=True, exist_ok=True)
    evaluated, problems = read_cards(runs)
    # Merge the scorecards, so the sections of a single run's report also work for several runs.
    card = merge(evaluated) if evaluated else None
    run_notes = {run: " · ".join(filter(None, ((notes or {}).get(run), problems.get(run)))) for run in runs}
    merged = _write_merged(evaluated, card, out.parent)
    events = {
        run: {stage: read_events(artifact.path) for stage, artifact in artifacts.items()}
        for run, artifacts in runs.items()
    }
    curves, same_stages = _curve_sections(runs, events, assets)
    table = run_table(runs, evaluated, card, run_notes, assets)
    sections = evaluation_sections(merged, card, _events_by_label(runs, events), assets)
    # The trade-off figures below show the same points as the plots of score against KL.
    assets.figures[:] = [figure for figure in assets.figures if figure not in sections["drift"]]
    trade_offs = find_trade_offs(evaluated, card, assets)
    gaps = kl_gaps(runs, events)
    for text in gaps:
        warn(text)
    html = load_template("comparison.html.jinja").render(
        **page_shell(title),
        **{**sections, "drift": [], **_summary(evaluated, card, trade_offs, seeds)},
        seeds=seed_section(seeds, assets),
        sweep=sweep_section(sweep, assets),
        runs=table,
        first=evaluated[0].name if evaluated else "",
        trade_offs=[trade_off["figure"] for trade_off in trade_offs],
        kl_gaps=gaps,
        other_items=[*differing_item_counts(evaluated), *differing_prompts(evaluated)],
        curves=curves.sections,
        curves_json=script_json(curves.readings),
        max_runs=MAX_RUNS,
        same=same_stages,
        costs=cost_rows(runs, assets),
        folders=(FIGURES, TABLES),
    )
    assets.write(out.parent)
    write_text_atomically(out, html)
    return out


def _write_merged(evaluated: Sequence[EvaluatedRun], card: Card | None, folder: Path) -> list[Artifact]:
    """Write the merged scorecard and samples as files, from which the page's sections read them."""
    if card is None:
        for name in (SCORECARD, SAMPLES):  # an earlier comparison may have left them
            (folder / name).unlink(missing_ok=True)
        return []
    write_text_atomically(folder / SCORECARD, json.dumps(card, indent=1) + "\n")
    samples = "".join(json.dumps(line) + "\n" for line in merge_samples(evaluated))
    write_text_atomically(folder / SAMPLES, samples)
    return [Artifact("comparison", Kind.SCORECARD, folder, {})]


def _summary(
    evaluated: Sequence[EvaluatedRun],
    card: Card | None,
    trade_offs: Sequence[Mapping[str, Any]],
    seeds: SeedComparison | None,
) -> dict[str, Any]:
    """Return the first section: the decision, boxes and findings, about runs or about settings over their seeds."""
    if seeds is not None:
        findings = group_findings(seed_findings(seeds))
        return {"decision": seeds.decision, "heads": seed_headlines(seeds), "findings": findings}
    if card is None:
        return {"decision": None, "heads": [], "findings": []}
    subjects = [run.subject_label for run in evaluated]
    return {
        "decision": decide_by_items(card, comparable_columns(evaluated, card), subjects),
        "heads": _headlines(evaluated, card),
        "findings": _findings(evaluated, card, trade_offs),
    }


def _headlines(evaluated: Sequence[EvaluatedRun], card: Card) -> list[dict[str, Any]]:
    """Return a box for each run: the primary metric of the checkpoint that the run is about."""
    first = evaluated[0]
    return [
        {
            "run": run.name,
            "subject": run.subject,
            "estimate": card["estimates"][run.subject_label].get(card["primary"]),
            "difference": find_difference(card, run.subject_label, first.subject_label, card["primary"]),
            "against": first.name,
        }
        for run in evaluated
    ]


def _findings(
    evaluated: Sequence[EvaluatedRun], card: Card, trade_offs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the comparison's findings as sentences by group; ``kind`` is a verdict or ``note``."""
    lines = []
    first = evaluated[0]
    for run in evaluated[1:]:
        row = find_difference(card, run.subject_label, first.subject_label, card["primary"])
        if row is not None:
            unclear = row["verdict"] == "unclear"
            relation = "is not clearly different from" if unclear else f"is {row['verdict']} than"
            text = f"{run.name} {relation} {first.name}: {signed(row['value'])} (95 % interval {interval(row, True)})."
            lines.append({"kind": row["verdict"], "text": text})
    return group_findings(lines + [{"kind": "note", "text": trade_off["text"]} for trade_off in trade_offs])


def _stage_keys(runs: Runs, stage: str) -> set[str]:
    return {str(artifacts[stage].record.get("key")) for artifacts in runs.values() if stage in artifacts}


def _events_by_label(runs: Runs, events: Mapping[str, Mapping[str, Events]]) -> dict[str, Events]:
    """Return the stages' events: under ``run: stage``, or under the stage's name if all runs share it."""
    labeled: dict[str, Events] = {}
    for run, by_stage in events.items():
        for stage, stage_events in by_stage.items():
            # With a single run every stage has one key, and its name needs no label either way.
            is_shared = len(_stage_keys(runs, stage)) == 1 and len(runs) > 1
            labeled.setdefault(stage if is_shared else f"{run}: {stage}", stage_events)
    return labeled


def _curve_sections(
    runs: Runs, events: Mapping[str, Mapping[str, Events]], assets: AssetWriter
) -> tuple[CurveSections, list[str]]:
    """Return panels with a line for each run, by stage, and the stages that all runs share.

    A shared stage has the same curves in every run, so it gets no panels.
    """
    sections = CurveSections(assets)
    same_stages: list[str] = []
    for stage in dict.fromkeys(stage for artifacts in runs.values() for stage in artifacts):
        by_run = {run: by_stage[stage] for run, by_stage in events.items() if stage in by_stage}
        # A stage that all runs share has one curve, which would be drawn once for each run.
        if len(by_run) > 1 and len(_stage_keys(runs, stage)) == 1:
            same_stages.append(stage)
            continue
        # Choose the runs before the curves, because a metric that only undrawn runs have would get an empty panel.
        drawn_runs = dict(list(by_run.items())[:MAX_RUNS])
        curves, left_out = run_curves(drawn_runs, MAX_PANELS)
        sections.add(stage, curves, left_out, undrawn_runs=list(by_run)[MAX_RUNS:])
    return sections, same_stages
