"""``align compare``: several runs on one page, settings against results. Imports nothing heavy."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from align.cli.parser import add_store, print_json
from align.cli.report import add_output, output_folder, show
from align.errors import UserError

if TYPE_CHECKING:
    from align.cli.run_page import RunOf
    from align.store.store import Store

NAMED = re.compile(r"([^=/\\]{1,60})=(.+)", re.DOTALL)
PAGE = "compare.html"
FOLDER = "_compare"
"""Below the store's reports; no run's name begins so."""
LONGEST = 100


def run(options: argparse.Namespace) -> int:
    """compare runs on one page: changed settings against results, score against KL, curves over each other"""
    from align.cli.console import printable
    from align.cli.run_page import damages, finished
    from align.report.compare.page import write_comparison
    from align.runner.open_store import open_store
    from align.store.store import REPORTS

    folder = output_folder(options.output)
    store = open_store(None, options.store)
    runs = find_runs(options.runs, store)
    artifacts = {name: finished(one, store) for name, one in runs.items()}
    for text in dict.fromkeys(text for one in runs.values() for text in damages(one, store).values()):
        print(printable(f"! left out: {text}"), file=sys.stderr)
    empty = [name for name, found in artifacts.items() if not found]
    if empty:
        raise UserError(f"{', '.join(empty)}: no stage is finished yet, so there is nothing to compare.")
    notes = {name: note for name, one in runs.items() if (note := _note(one, store))}
    folder = folder or store.root / REPORTS / FOLDER / "-".join(runs)[:LONGEST]
    page = write_comparison(artifacts, folder / PAGE, title=options.title, notes=notes)
    if options.json:
        print_json({"runs": list(runs), "path": str(page.resolve()), "tables": str((folder / "tables").resolve())})
    else:
        show(page, options.open)
    return 0


def find_runs(words: list[str], store: Store) -> dict[str, RunOf]:
    """The runs that ``words`` mean, by the name each goes under. Raises ``UserError`` for fewer than two of them."""
    from align.cli.run_page import find_run

    found: dict[str, RunOf] = {}
    for word in words:
        named = NAMED.fullmatch(word)
        name, rest = (named[1], named[2]) if named and not Path(word).exists() else (None, word)
        one = find_run(rest, store)
        name = name or one.name
        if name in found:
            raise UserError(f"two runs are called '{name}'; give each a name of its own: NAME=RUN.")
        found[name] = one
    if len(found) < 2:
        raise UserError(f"{words[0]}: one run alone is compared with nothing; name another, or use `align report`.")
    return found


def _note(run: RunOf, store: Store) -> str:
    """What a reader must know of a run that is not whole."""
    from align.cli.run_page import finished, unfinished

    failure = unfinished(run, store)
    if failure is not None:
        first = failure.message.splitlines()[0] if failure.message else ""
        return f"{failure.stage} {failure.status}: {first}"
    missing = [name for name, (kind, _) in run.stages.items() if kind != "report" and name not in finished(run, store)]
    return f"not run: {', '.join(missing)}" if missing else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``align compare``."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's name or a pipeline file; NAME=RUN shows it under that name"
    )
    parser.add_argument("--title", default="Comparison of runs", help="heading of the page")
    add_output(parser)
    add_store(parser)
