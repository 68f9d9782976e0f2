"""``align report``: write the page about a run from what the store holds now, and open it. Imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path

from align.cli.console import printable
from align.cli.parser import add_store, print_json
from align.errors import UserError


def run(options: argparse.Namespace) -> int:
    """write the report of a run anew, by name or by its pipeline file, and open it with --open"""
    from align.cli.artifacts import say_damage
    from align.cli.run_page import RunOf, damages, find_run, remembered, unfinished, write_page
    from align.pipeline.pipeline import Pipeline
    from align.runner.open_store import open_store

    word = options.run
    named = None if word is None or not word.endswith((".yaml", ".yml")) else Pipeline.load(word)
    store = open_store(named, options.store)
    found: RunOf
    if word is not None:
        found = find_run(word, store)
    else:
        runs, damaged = store.survey_runs()
        say_damage(damaged)
        if not runs:
            raise UserError(f"{store.root}: no run has been made in this store yet; `align run PIPELINE` makes one.")
        latest = max(runs, key=lambda name: float(runs[name].get("when", 0)))
        found = remembered(latest, runs[latest])
    for name, text in damages(found, store).items():
        print(printable(f"! stage '{name}' is left out: {text}"), file=sys.stderr)
    page = write_page(found, store, unfinished(found, store), output_folder(options.output))
    if options.json:
        print_json({"name": found.name, "path": str(page.resolve())})
    else:
        show(page, options.open)
    return 0


def output_folder(given: str | None) -> Path | None:
    """The folder of ``--output``; ``UserError`` where it is a file."""
    if given is None:
        return None
    folder = Path(given)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {given}: is a file; name a folder.")
    return folder


def show(page: Path, wanted: bool) -> None:
    """Say where the page is, and open it where that is wanted and can be done."""
    print(f"Report: {printable(str(page.resolve()))}")
    if wanted and not _open(page):
        print("note: no browser could be started here; open the file yourself.", file=sys.stderr)


def _open(page: Path) -> bool:
    try:
        return webbrowser.open(page.resolve().as_uri())
    except (webbrowser.Error, OSError):
        return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``align report``."""
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's name or a pipeline file; by default the store's latest run"
    )
    add_output(parser)
    add_store(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """``--open`` and ``--output``, which every command that writes a page has."""
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument(
        "--output", metavar="DIR", help="write it there, with figures and tables, instead of into the store"
    )
