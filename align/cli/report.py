"""``align report`` and ``align compare``: the page about a run, and several runs on one page. Has no heavy imports."""

from __future__ import annotations

import argparse
import re
import sys
import time
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import Handler, add_store, print_json, print_warning
from align.errors import UserError, printable

if TYPE_CHECKING:
    from align.report.compare.over_seeds import SeedComparison
    from align.runs.run_page import RunOutline
    from align.store.store import Store

MIN_SECONDS = 1
MAX_SECONDS = 3600
QUIET_SECONDS = 30.0
"""A run of which no stage runs for so long has ended: between two stages there are seconds."""
REPORT_KIND = "report"
SHARE_OF_TIME = 0.2
"""Largest share of the time that goes into writing pages: the run needs the processors."""
NAMED = re.compile(r"([^=/\\]{1,60})=(.+)", re.DOTALL)
COMPARISON = "compare.html"
COMPARISONS = "_compare"
"""Folder of comparisons below the store's reports; no run's name begins with ``_``."""
MAX_FOLDER_NAME = 100
SEED = "seed"


def run(options: argparse.Namespace) -> int:
    """Run ``align report``."""
    from align.runs.run_page import damaged_stages, find_failure, find_run, open_store_of, write_page

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
    from align.runs.run_page import stored_outline

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


@dataclass
class Watch:
    """A run that is watched: its store, the folder of its page (None: in the store), and seconds between pages."""

    outline: RunOutline
    store: Store
    folder: Path | None
    every: float
    sleep: Callable[[float], None] = time.sleep

    def follow(self, show: Callable[[Path], None]) -> Path | None:
        """Write the page until the run has ended, and once more without the reload; return it, None without a page.

        ``show`` is called with the page after the first time. Ctrl-C also ends it.
        """
        page = None
        last_active = time.monotonic()
        try:
            while True:
                is_active = self._is_active()
                now = time.monotonic()
                last_active = now if is_active else last_active
                if self._is_done() or (self._has_content() and now - last_active > QUIET_SECONDS):
                    break
                spent = 0.0
                if self._has_content():
                    is_first = page is None
                    page = self._write(refresh=max(1, round(self.every)))
                    spent = time.monotonic() - now
                    if is_first:
                        show(page)
                # Reading a large run is slower, so it is read less often.
                self.sleep(max(self.every, spent / SHARE_OF_TIME))
        except KeyboardInterrupt:
            # The page of before would reload itself for ever.
            return self._write() if page is not None else None
        is_first = page is None
        page = self._write()
        if is_first:
            show(page)
        return page

    def _write(self, refresh: int | None = None) -> Path:
        from align.runs.run_page import find_failure, write_page

        failure = find_failure(self.outline, self.store)
        return write_page(self.outline, self.store, failure, self.folder, always=False, refresh=refresh)

    def _is_active(self) -> bool:
        """Return True while a stage runs, here or elsewhere, or a job of the run waits in a queue."""
        from align.runs.status import live_jobs

        if any(self.store.is_locked(kind, key) for kind, key in self.outline.stages.values()):
            return True
        jobs, slurm_error = live_jobs(self.store, [self.outline])
        # A scheduler that does not answer may still have jobs of the run.
        return bool(jobs) or bool(slurm_error)

    def _is_done(self) -> bool:
        """Return True once every stage but the report has its artifact and none is made again."""
        from align.runs.run_page import finished_artifacts

        artifacts = finished_artifacts(self.outline, self.store)
        stages = [name for name, (kind, _) in self.outline.stages.items() if kind != REPORT_KIND]
        return all(name in artifacts for name in stages) and not self._is_active()

    def _has_content(self) -> bool:
        """Return True if a stage has begun, which gives the page content."""
        from align.runs.run_page import find_failure, finished_artifacts

        has_begun = find_failure(self.outline, self.store) is not None
        return has_begun or bool(finished_artifacts(self.outline, self.store))


def run_compare(options: argparse.Namespace) -> int:
    """Run ``align compare``."""
    from align.report.compare.comparison import write_comparison
    from align.report.compare.over_seeds import compare_over_seeds
    from align.runs.run_page import damaged_stages, finished_artifacts, open_store_of, page_folder

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
    folder = folder or page_folder(store, COMPARISONS) / "-".join(runs)[:MAX_FOLDER_NAME]
    seeds = compare_over_seeds(artifacts) if options.over == SEED else None
    page = write_comparison(
        artifacts, folder / COMPARISON, title=options.title, notes=notes, seeds=seeds, warn=print_warning
    )
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
    match = None if Path(word).exists() else NAMED.fullmatch(word)
    return (match[1], match[2]) if match else (None, word)


def find_runs(words: list[str], store: Store) -> dict[str, RunOutline]:
    """Return the runs that ``words`` name, by the name that the page shows. Raise ``UserError`` for fewer than two."""
    from align.runs.run_page import find_run

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
    from align.runs.run_page import find_failure, finished_artifacts

    failure = find_failure(outline, store)
    if failure is not None:
        first_line = failure.message.splitlines()[0] if failure.message else ""
        return f"{failure.stage} {failure.status}: {first_line}"
    artifacts = finished_artifacts(outline, store)
    expected = [name for name, (kind, _) in outline.stages.items() if kind != "report"]
    missing = [name for name in expected if name not in artifacts]
    return f"not run: {', '.join(missing)}" if missing else ""


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
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


COMPARE = Handler(run_compare, add_compare_arguments)
