"""``align report``: write the page about a run from what the store holds now, and open it. Has no heavy imports."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from align.cli.parser import add_store, print_json
from align.errors import UserError, printable

if TYPE_CHECKING:
    from align.cli.run_page import RunOutline
    from align.store.store import Store

MIN_SECONDS, MAX_SECONDS = 1, 3600


def run(options: argparse.Namespace) -> int:
    """Run ``align report``."""
    from align.cli.run_page import damaged_stages, find_failure, find_run, open_store_of, write_page

    store = open_store_of([options.run], options.store)
    outline = _latest_run(store) if options.run is None else find_run(options.run, store)
    for name, text in damaged_stages(outline, store).items():
        print(printable(f"! stage '{name}' is left out: {text}"), file=sys.stderr)
    folder = output_folder(options.output)
    if options.watch:
        return _watch(outline, store, folder, options)
    page = write_page(outline, store, find_failure(outline, store), folder)
    if options.json:
        print_json({"name": outline.name, "path": str(page.resolve())})
    else:
        show_page(page, options.open)
    return 0


def _watch(outline: RunOutline, store: Store, folder: Path | None, options: argparse.Namespace) -> int:
    """Write the page until the run has ended or Ctrl-C is pressed."""
    from align.cli.watch_report import Watch

    if options.json:
        raise UserError("--watch writes a page again and again; leave out --json, or use `align status --json`.")
    if not MIN_SECONDS <= options.every <= MAX_SECONDS:
        raise UserError(f"--every {options.every:g}: should be {MIN_SECONDS} to {MAX_SECONDS} seconds.")
    print(f"Watches {printable(outline.name)} until it ends; Ctrl-C stops watching, not the run.", flush=True)
    page = Watch(outline, store, folder, options.every).follow(lambda page: show_page(page, options.open))
    print("No stage has begun, so there is no page." if page is None else "The page is final; it reloads no more.")
    return 0


def _latest_run(store: Store) -> RunOutline:
    """Return the run that the store saw last; raise ``UserError`` if it has none."""
    from align.cli.artifacts import print_damage
    from align.cli.run_page import stored_outline

    runs, damaged = store.survey_runs()
    print_damage(damaged)
    if not runs:
        raise UserError(f"{store.root}: this store has no runs yet; start one with `align run PIPELINE`.")
    latest = max(runs, key=lambda name: float(runs[name].get("when", 0)))
    return stored_outline(latest, runs[latest])


def output_folder(path: str | None) -> Path | None:
    """Return the folder of ``--output``; raise ``UserError`` if it is a file."""
    if path is None:
        return None
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {path}: is a file; name a folder.")
    return folder


def show_page(page: Path, in_browser: bool) -> None:
    """Print the page's path, and open the page where ``in_browser`` is set and a browser can be started."""
    print(f"Report: {printable(str(page.resolve()))}")
    if in_browser and not _open(page):
        print("note: no browser could be started here; open the file yourself.", file=sys.stderr)


def _open(page: Path) -> bool:
    try:
        return webbrowser.open(page.resolve().as_uri())
    except (webbrowser.Error, OSError):
        return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align report``."""
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's name or a pipeline file (default: the store's latest run)"
    )
    parser.add_argument(
        "--watch", action="store_true", help="write the page again while the run goes on; the page reloads itself"
    )
    parser.add_argument(
        "--every", type=float, default=15.0, metavar="SECONDS", help="seconds between pages of --watch (default: 15)"
    )
    add_output(parser)
    add_store(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--open`` and ``--output``, which every command that writes a page has."""
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="write the page, its figures and tables there instead of into the store (or, if the store is read-only, "
        "into reports/ of the current folder)",
    )
