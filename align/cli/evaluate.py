"""``align eval``: score checkpoints by a suite, through the same stage as a pipeline's. Imports nothing heavy."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import add_store, print_json

if TYPE_CHECKING:
    from align.cli.checkpoints import Checkpoint
    from align.store.store import Store

FILES = ("scorecard.json", "samples.jsonl", "items.jsonl")
BESIDE = ("figures", "tables")


def run(options: argparse.Namespace) -> int:
    """score checkpoints by a suite of tasks, beside their base model; cached and resumable like any run"""
    from align.cli.checkpoints import find_all, find_reward, find_rows
    from align.cli.report import output_folder
    from align.cli.run import run_and_report, run_document, say_gates, say_page
    from align.cli.suite import REWARDS, ROWS, choose_reference, load_suite, suite_pipeline
    from align.runner.open_store import open_store

    folder = output_folder(options.output)
    suite = load_suite(options.suite, options.assignments)
    store = open_store(None, options.store)
    checkpoints, bases = with_bases(find_all(options.checkpoints, options.store), store, options.base)
    reference = choose_reference(options.reference, [one.name for one in checkpoints], bases)
    inputs: dict[str, dict[str, Any]] = {}
    for name in REWARDS:
        if getattr(options, name) is not None:
            inputs[name] = find_reward(f"--{name.replace('_', '-')}", getattr(options, name), options.store)
    for name, kinds in ROWS.items():
        if getattr(options, name) is not None:
            inputs[name] = find_rows(f"--{name}", getattr(options, name), options.store, kinds)
    pipeline, evaluation = suite_pipeline(suite, checkpoints, bases, reference, inputs, options.name, _note)
    try:
        outcome = run_and_report(pipeline, quiet=options.json, store=options.store)
    except KeyboardInterrupt:
        print("\nStopped; what is done is kept. The same command continues.", file=sys.stderr)
        raise
    made = outcome.run.artifacts[evaluation]
    if folder is not None:
        copy_results(made.path, outcome.page, folder)
    if options.json:
        document = run_document(pipeline, outcome)
        print_json({**document, "scorecard": str((folder or made.path).resolve() / FILES[0])})
        return 1 if outcome.run.failed_gates() else 0
    from align.cli.score_table import print_scorecard

    print_scorecard(made.path / FILES[0])
    if folder is not None and outcome.page is not None:
        say_page(folder / "report.html")
    else:
        say_page(outcome.page)
    return say_gates(outcome.run)


def with_bases(checkpoints: list[Checkpoint], store: Store, wanted: bool) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints with the base models that they come from in front, and the names of all base models.

    What is not known is said on standard error. Not ``wanted``, only those among ``checkpoints`` themselves count.
    """
    from align.cli.checkpoints import BASE, Checkpoint, base_of, unique
    from align.store.artifacts import Kind

    taken = {one.name for one in checkpoints}
    keys = {one.artifact.key for one in checkpoints if one.artifact is not None}
    added: list[Checkpoint] = []
    unknown: list[str] = []
    for one in checkpoints:
        if one.artifact is None or not wanted:
            continue
        found = base_of(one.artifact, store)
        if found is None:
            unknown.append(one.name)
        elif found.key not in keys:
            keys.add(found.key)
            name = unique(BASE, taken)
            taken.add(name)
            added.append(Checkpoint(name, {"stage": "artifact", "path": str(found.path)}, found))
    bases = [
        *(one.name for one in added),
        *(one.name for one in checkpoints if one.artifact is not None and one.artifact.kind == Kind.MODEL),
    ]
    plain = [one.name for one in checkpoints if one.is_plain]
    if not bases and plain:  # nothing is known of them, and a comparison has to start somewhere
        bases = plain[:1]
        if len(checkpoints) > 1:
            _note(f"'{plain[0]}' counts as the base model: the first one without a record of where it comes from")
    if unknown:
        _note(
            f"the base model of {', '.join(unknown)} is not in the store any more, so it is not compared; name it as "
            "the first checkpoint, or say --no-base"
        )
    first = [one for one in checkpoints if one.name in bases]
    return [*added, *first, *(one for one in checkpoints if one.name not in bases)], bases


def copy_results(artifact: Path, page: Path | None, folder: Path) -> None:
    """Put the scorecard, samples and items, and the page with its figures and tables, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (artifact / name).is_file():
            shutil.copyfile(artifact / name, folder / name)
    if page is None:
        return
    shutil.copyfile(page, folder / page.name)
    for name in BESIDE:
        if (page.parent / name).is_dir():
            if (folder / name / "index.json").is_file():  # of an earlier page
                shutil.rmtree(folder / name)
            shutil.copytree(page.parent / name, folder / name, dirs_exist_ok=True)


def _note(text: str) -> None:
    from align.cli.console import printable

    print(f"note: {printable(text)}", file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``align eval``."""
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT",
        help="a folder, a key, PIPELINE:STAGE, a built-in or Hub name (with @commit); NAME=CHECKPOINT names it",
    )  # fmt: skip
    parser.add_argument("--suite", required=True, metavar="SUITE", help="like pipelines/suites/standard.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
        help="override a field of the suite, like tasks.ifeval.max_items=50; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--reference", metavar="NAME", help="what others are compared with (default: the first that is no base)"
    )
    parser.add_argument("--reward", metavar="CHECKPOINT", help="a reward model, which scores answers")
    parser.add_argument("--second-reward", metavar="CHECKPOINT", help="another one, to see how far they agree")
    parser.add_argument("--prompts", metavar="BUILD", help="prompts to answer: a recipe, a build's folder, or a key")
    parser.add_argument("--pairs", metavar="BUILD", help="preferences, to measure the reward models on")
    parser.add_argument("--heldout", metavar="BUILD", help="instructions, whose loss is measured")
    parser.add_argument("--no-base", dest="base", action="store_false", help="leave out the checkpoints' base model")
    parser.add_argument("--name", metavar="RUN", help="name of the run (default: eval- and the suite's name)")
    parser.add_argument("--output", metavar="DIR", help="copy scorecard, samples, items and the page there, too")
    add_store(parser)
