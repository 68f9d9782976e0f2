"""``align compare``: several runs on one page, settings against results. Has no heavy imports."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import add_store, print_json, print_warning
from align.cli.report import add_output, output_folder, show_page
from align.errors import UserError, printable

if TYPE_CHECKING:
    from align.cli.run_page import RunOutline
    from align.report.compare.over_seeds import SeedComparison
    from align.store.store import Store

NAMED = re.compile(r"([^=/\\]{1,60})=(.+)", re.DOTALL)
PAGE = "compare.html"
FOLDER = "_compare"
"""Folder of comparisons below the store's reports; no run's name begins with ``_``."""
MAX_FOLDER_NAME = 100
SEED = "seed"


def run(options: argparse.Namespace) -> int:
    """Run ``align compare``."""
    from align.cli.run_page import damaged_stages, finished_artifacts, open_store_of, page_folder
    from align.report.compare.comparison import write_comparison
    from align.report.compare.over_seeds import compare_over_seeds

    folder = output_folder(options.output)
    store = open_store_of([split_name(word)[1] for word in options.runs], options.store)
    runs = find_runs(options.runs, store)
    artifacts = {name: finished_artifacts(outline, store) for name, outline in runs.items()}
    # Runs share stages, so the same damage may show up in several of them: print it once.
    damage = [text for outline in runs.values() for text in damaged_stages(outline, store).values()]
    for text in dict.fromkeys(damage):
        print(printable(f"! left out: {text}"), file=sys.stderr)
    empty = [name for name, by_stage in artifacts.items() if not by_stage]
    if empty:
        raise UserError(f"{', '.join(empty)}: no stage is finished yet, so there is nothing to compare.")
    notes = {name: note for name, outline in runs.items() if (note := _note(outline, store))}
    folder = folder or page_folder(store, FOLDER) / "-".join(runs)[:MAX_FOLDER_NAME]
    seeds = compare_over_seeds(artifacts) if options.over == SEED else None
    page = write_comparison(artifacts, folder / PAGE, title=options.title, notes=notes, seeds=seeds, warn=print_warning)
    if options.json:
        document: dict[str, Any] = {
            "runs": list(runs),
            "path": str(page.resolve()),
            "tables": str((folder / "tables").resolve()),
        }
        if seeds is not None:
            document["over_seed"] = seeds.as_rows()
        print_json(document)
    else:
        if seeds is not None:
            _print_seeds(seeds)
        show_page(page, options.open)
    return 0


def _print_seeds(seeds: SeedComparison) -> None:
    """Print the decision, and each setting's mean, interval and numbers by seed."""
    if seeds.decision is not None:
        print(printable(f"{seeds.decision.lead}: {seeds.decision.reason}"))
    for line in seeds.as_lines():
        print(printable(f"  {line}"))


def split_name(word: str) -> tuple[str | None, str]:
    """Return the name and the run of ``NAME=RUN``; without a name, None and the word."""
    # An existing file wins over NAME=RUN: its name may have a "=" in it.
    named = None if Path(word).exists() else NAMED.fullmatch(word)
    return (named[1], named[2]) if named else (None, word)


def find_runs(words: list[str], store: Store) -> dict[str, RunOutline]:
    """Return the runs that ``words`` name, by the name that the page shows. Raise ``UserError`` for fewer than two."""
    from align.cli.run_page import find_run

    runs: dict[str, RunOutline] = {}
    for word in words:
        chosen_name, run_word = split_name(word)
        outline = find_run(run_word, store)
        name = chosen_name or outline.name
        if name in runs:
            raise UserError(f"two runs are called '{name}'; give each its own name: NAME=RUN.")
        runs[name] = outline
    if len(runs) < 2:
        raise UserError(f"{words[0]}: a comparison needs two runs; name another, or use `align report`.")
    return runs


def _note(outline: RunOutline, store: Store) -> str:
    """Return a warning about a run that is incomplete, or an empty text."""
    from align.cli.run_page import find_failure, finished_artifacts

    failure = find_failure(outline, store)
    if failure is not None:
        first_line = failure.message.splitlines()[0] if failure.message else ""
        return f"{failure.stage} {failure.status}: {first_line}"
    artifacts = finished_artifacts(outline, store)
    missing = [name for name, (kind, _) in outline.stages.items() if kind != "report" and name not in artifacts]
    return f"not run: {', '.join(missing)}" if missing else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align compare``."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's name or a pipeline file; NAME=RUN shows it under that name"
    )
    parser.add_argument(
        "--over",
        choices=[SEED],
        help="count runs that differ by seed alone as one: mean, interval and tests over seeds",
    )
    parser.add_argument("--title", default="Comparison of runs", help="heading of the page")
    add_output(parser)
    add_store(parser)
