"""``align eval``: score checkpoints by a suite, with the stage that pipelines also use. Has no heavy imports."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import add_assignments, add_store, print_json
from align.errors import printable

if TYPE_CHECKING:
    from align.cli.checkpoints import Checkpoint
    from align.store.store import Store

FILES = ("scorecard.json", "samples.jsonl", "items.jsonl")


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
    from align.cli.score_table import print_scorecard

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
    plain = [checkpoint.name for checkpoint in checkpoints if checkpoint.is_plain]
    if not bases and plain:  # a comparison needs a start, and plain models have no record of theirs
        bases = plain[:1]
        if len(checkpoints) > 1:
            _print_note(f"'{plain[0]}' counts as the base model: it is the first one without a record of its origin")
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
    from align.cli.run_page import PAGE_FOLDERS

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
