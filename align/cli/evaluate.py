"""``align eval``: score checkpoints by a suite, with the stage that pipelines also use, and print the scores."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.cli.parser import add_assignments, add_store, print_json, table_console
from align.errors import printable
from align.report.page.number_format import ACCURACIES, MARKS, interval, number

if TYPE_CHECKING:
    from align.cli.checkpoints import Checkpoint
    from align.store.store import Store

FILES = ("scorecard.json", "samples.jsonl", "items.jsonl")
STYLES = {"better": "green", "worse": "red"}
Card = dict[str, Any]


def run(options: argparse.Namespace) -> int:
    """Run ``align eval``."""
    from align.cli.checkpoints import find_all, find_reward, find_rows
    from align.cli.report import output_folder
    from align.cli.run_session import print_failed_gates, print_page, run_and_report, run_document
    from align.cli.suite import (
        NAMED_ROWS,
        REWARDS,
        ROWS,
        ComparedCheckpoints,
        choose_reference,
        load_suite,
        suite_pipeline,
    )
    from align.runner.open_store import open_store
    from align.store.artifacts import PROMPT_SOURCES

    folder = output_folder(options.output)
    suite = load_suite(options.suite, options.assignments)
    store = open_store(None, options.store)
    # Bases come first: the table reads from the start of training to its end.
    checkpoints, bases = with_bases(find_all(options.checkpoints, options.store), store, options.base)
    reference = choose_reference(options.reference, [checkpoint.name for checkpoint in checkpoints], bases)
    # Every input becomes a stage of the suite's pipeline, so its key covers all compared inputs.
    inputs: dict[str, dict[str, Any]] = {}
    for name in REWARDS:
        if getattr(options, name) is not None:
            inputs[name] = find_reward(f"--{name.replace('_', '-')}", getattr(options, name), options.store)
    for name, kinds in ROWS.items():
        if getattr(options, name) is not None:
            inputs[name] = find_rows(f"--{name}", getattr(options, name), options.store, kinds)
        elif name in suite.rows:
            inputs[name] = find_rows(f"{options.suite}: {name}", suite.rows[name], options.store, kinds)
    for name, word in suite.named_rows.items():
        field = f"{NAMED_ROWS}.{name}"
        inputs[field] = find_rows(f"{options.suite}: {field}", word, options.store, PROMPT_SOURCES)
    compared = ComparedCheckpoints(checkpoints, bases, reference)
    pipeline, evaluation = suite_pipeline(suite, compared, inputs, options.name, _print_note)
    try:
        outcome = run_and_report(pipeline, quiet=options.json, store=options.store)
    except KeyboardInterrupt:
        print("\nStopped; finished work is kept. The same command continues.", file=sys.stderr)
        raise
    scorecard = outcome.run.artifacts[evaluation]
    # A failed gate still has results: they are copied before the exit code is decided.
    if folder is not None:
        copy_results(scorecard.path, outcome.page, folder)
    if options.json:
        document = run_document(pipeline, outcome)
        print_json({**document, "scorecard": str((folder or scorecard.path).resolve() / FILES[0])})
        return 1 if outcome.run.failed_gates() else 0
    print_scorecard(scorecard.path / FILES[0])
    if folder is not None and outcome.page is not None:
        print_page(folder / "report.html")
    else:
        print_page(outcome.page)
    return print_failed_gates(outcome.run)


def with_bases(checkpoints: list[Checkpoint], store: Store, add_bases: bool) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints with their base models in front, and the names of all base models.

    Without ``add_bases`` only base models among ``checkpoints`` count. Notes on unknown bases go to standard error.
    """
    from align.store.artifacts import Kind

    added: list[Checkpoint] = []
    if add_bases:
        added, without_base = _find_bases(checkpoints, store)
        if without_base:
            _print_note(
                f"the base model of {', '.join(without_base)} is no longer in the store, so it is not compared; name "
                "it as the first checkpoint, or use --no-base"
            )
    models = [c.name for c in checkpoints if c.artifact is not None and c.artifact.kind == Kind.MODEL]
    bases = [*(checkpoint.name for checkpoint in added), *models]
    plain_names = [checkpoint.name for checkpoint in checkpoints if checkpoint.is_plain]
    if not bases and plain_names:  # a comparison needs a start, and plain models have no record of theirs
        bases = plain_names[:1]
        if len(checkpoints) > 1:
            _print_note(
                f"'{plain_names[0]}' counts as the base model: it is the first one without a record of its origin"
            )
    first = [checkpoint for checkpoint in checkpoints if checkpoint.name in bases]
    rest = [checkpoint for checkpoint in checkpoints if checkpoint.name not in bases]
    return [*added, *first, *rest], bases


def _find_bases(checkpoints: list[Checkpoint], store: Store) -> tuple[list[Checkpoint], list[str]]:
    """Return the base models that are not among the checkpoints, and the checkpoints whose base is unknown."""
    from align.cli.checkpoints import BASE, Checkpoint, base_of
    from align.report.page.assets import unique_name

    used_names = {checkpoint.name for checkpoint in checkpoints}
    keys = {checkpoint.artifact.key for checkpoint in checkpoints if checkpoint.artifact is not None}
    added: list[Checkpoint] = []
    without_base: list[str] = []
    for checkpoint in checkpoints:
        if checkpoint.artifact is None:
            continue
        base = base_of(checkpoint.artifact, store)
        if base is None:
            without_base.append(checkpoint.name)
        elif base.key not in keys:
            keys.add(base.key)
            name = unique_name(BASE, used_names)
            used_names.add(name)
            added.append(Checkpoint(name, {"stage": "artifact", "path": str(base.path)}, base))
    return added, without_base


def copy_results(artifact: Path, page: Path | None, folder: Path) -> None:
    """Copy the scorecard, samples and items, and the page with its figures and tables, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (artifact / name).is_file():
            shutil.copyfile(artifact / name, folder / name)
    if page is None:
        return
    from align.runs.run_page import PAGE_FOLDERS

    shutil.copyfile(page, folder / page.name)
    for name in PAGE_FOLDERS:
        if (page.parent / name).is_dir():
            if (folder / name / "index.json").is_file():  # an earlier page wrote this folder
                shutil.rmtree(folder / name)
            shutil.copytree(page.parent / name, folder / name, dirs_exist_ok=True)


def _print_note(text: str) -> None:

    print(f"note: {printable(text)}", file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align eval``."""
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a folder, a key, PIPELINE:STAGE, a built-in or Hub name (with @commit); NAME=CHECKPOINT names it",
    )
    parser.add_argument(
        "--suite", required=True, metavar="SUITE", help="a suite's file, or the name of a shipped one: standard"
    )
    add_assignments(parser, "override a field of the suite, like tasks.ifeval.max_items=50; repeatable")
    parser.add_argument(
        "--reference", metavar="NAME", help="checkpoint to compare with (default: the first that is no base model)"
    )
    parser.add_argument("--reward", metavar="CHECKPOINT", help="a reward model that scores responses")
    parser.add_argument("--second-reward", metavar="CHECKPOINT", help="another reward model, to measure agreement")
    parser.add_argument("--prompts", metavar="BUILD", help="prompts: a recipe, a build's folder, or a key")
    parser.add_argument("--pairs", metavar="BUILD", help="preference pairs that the reward models are measured on")
    parser.add_argument("--heldout", metavar="BUILD", help="instructions whose loss is measured")
    parser.add_argument("--no-base", dest="base", action="store_false", help="do not add the checkpoints' base models")
    parser.add_argument("--name", metavar="RUN", help="name of the run (default: eval-SUITE)")
    parser.add_argument("--output", metavar="DIR", help="also copy scorecard, samples, items and the page there")
    add_store(parser)


def print_scorecard(path: Path, console: Console | None = None) -> None:
    """Print the scorecard in ``path``: metrics down, systems across, then its gates and flags."""
    card: Card = json.loads(path.read_text(encoding="utf-8"))
    console = console or table_console()
    systems = score_table(card)
    models = reward_table(card)
    if systems.row_count:
        console.print(systems)
    if models.row_count:
        console.print(models)
    console.print(_text(legend(card)), style="dim", soft_wrap=True)
    for line, style in findings(card):
        console.print(_text(line), style=style, soft_wrap=True)


def score_table(card: Card) -> Table:
    """Return the table of metrics by system. Its text has no markup and no control characters."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for system in card["policies"]:
        tag = _tag(card, system)
        table.add_column(_text(f"{system} ({tag})" if tag else system))
    task = None
    for name, metric in card["metrics"].items():
        cells = [_cell(card, system, name) for system in card["policies"]]
        if not any(cell.plain for cell in cells):
            continue
        # A line between the metrics of different tasks.
        if metric.get("task") != task and task is not None:
            table.add_section()
        task = metric.get("task")
        table.add_row(_title(name, metric), *cells, style="bold" if name == card["primary"] else "")
    return table


def reward_table(card: Card) -> Table:
    """Return the table of reward models: numbers down, a column for each model and set of pairs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    reports = card.get("reward_models") or []
    table.add_column(_text("reward models"))
    for report in reports:
        task = str(report.get("task", "pairs"))
        title = str(card["tasks"][task]["title"]) if task in card["tasks"] else "held-out pairs"
        column = _text(f"{report.get('stage', 'reward model')} on {title}")
        column.append(f"\n{printable(task)}", style="dim not bold")
        table.add_column(column)
    if reports:
        for key, title in {"pairs": "pairs", "ties": "ties of its scores"}.items():
            table.add_row(_text(title), *(_text(number(report.get(key))) for report in reports))
    names = {key: f"ordered right, {title}" for key, title in ACCURACIES.items()} | {"margin": "mean score difference"}
    for key, title in names.items():
        cells = [_estimate(report.get(key)) for report in reports]
        if any(cell.plain for cell in cells):
            table.add_row(_text(title), *cells, style="bold" if key == "as_labeled" else "")
    return table


def _estimate(estimate: Any) -> Text:
    """Return a number above its interval; empty without a number."""
    row = estimate if isinstance(estimate, dict) else {"value": estimate}
    if row.get("value") is None:
        return Text()
    text = Text(number(row["value"]))
    if isinstance(row.get("low"), (int, float)):
        text.append(f"\n{interval(row)}", style="dim not bold")
    return text


def _title(name: str, metric: dict[str, Any]) -> Text:
    """Return a metric's title above its name, which gates and ``--set`` use; only the name if they are equal."""
    text = _text(str(metric["title"]))
    if metric["title"] == name:
        return text
    text.append(f"\n{printable(name)}", style="dim not bold")
    return text


def _tag(card: Card, system: str) -> str:
    if system == card["base"]:
        return "base"
    return "reference" if system == card["reference"] else ""


def _cell(card: Card, system: str, metric: str) -> Text:
    """Return ``0.412 ▲`` above its interval; empty if the system has no such number."""
    estimate = card["estimates"].get(system, {}).get(metric)
    if estimate is None or estimate.get("value") is None:
        return Text()
    verdict = _verdict(card, system, metric)
    mark = f" {MARKS[verdict]}" if verdict in MARKS and verdict != "unclear" else ""
    text = Text(f"{number(estimate['value'])}{mark}", style=STYLES.get(verdict, ""))
    if isinstance(estimate.get("low"), (int, float)) and math.isfinite(estimate["low"]):
        text.append(f"\n{interval(estimate)}", style="dim not bold")
    return text


def _verdict(card: Card, system: str, metric: str) -> str:
    """Return a system's verdict against the reference; the reference's verdict is against the base."""
    # The reference is not compared with itself, so it shows whether training helped at all.
    against = card["base"] if system == card["reference"] else card["reference"]
    for row in card["differences"]:
        if (row["policy"], row["against"], row["metric"]) == (system, against, metric):
            return str(row["verdict"])
    return ""


def legend(card: Card) -> str:
    """Return the explanation of numbers and marks."""
    if len(card["policies"]) == 1:
        return "Below each number its 95 % interval."
    with_base = card["base"] is not None and card["base"] != card["reference"]
    base = f", {card['reference']} with {card['base']}" if with_base else ""
    return (
        f"Below each number its 95 % interval. ▲ better, ▼ worse, ↑ ↓ higher or lower: clear of zero in a paired "
        f"comparison with {card['reference']}{base} and after Holm's correction; no mark: no clear difference."
    )


def findings(card: Card) -> list[tuple[str, str]]:
    """Return gates and flags as lines, each with its style."""
    lines = []
    for gate in card.get("gates") or []:
        mark, style = _gate_mark(gate)
        lines.append((f"{mark} {gate['text']}", style))
    return lines + [(f"! {flag['text']}", "yellow") for flag in card["flags"]]


def _gate_mark(gate: dict[str, Any]) -> tuple[str, str]:
    """Return a gate's mark and style."""
    if gate["passed"] is None:
        return "?", "yellow"
    if gate["passed"]:
        return "✓", "dim"
    return ("!", "yellow") if gate["level"] == "warning" else ("✗", "red")


def _text(text: str) -> Text:
    """Return plain text without markup or hidden characters."""
    return Text(printable(text.replace("\n", " ")))
