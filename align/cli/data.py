"""``align data build|show|lint|diff|push``: datasets from recipes, looked at and handed on. Imports nothing heavy."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.cli.parser import Parser, add_store, print_json
from align.errors import UserError

LEFT_HERE = ("log.txt", "events.jsonl")
"""Files of an artifact that say when and how long, not what; they are not copied out."""


def run(options: argparse.Namespace) -> int:
    """datasets: build a recipe, show its rows, lint them, compare two builds, push one to the Hub"""
    return COMMANDS[options.data_command](options)


def build(options: argparse.Namespace) -> int:
    """build a recipe into the store, or find it there; a killed build goes on where it was"""
    from align.cli.arguments import STAGE, build_recipe
    from align.data.built import read_ledger
    from align.data.ledger import summary_lines
    from align.errors import printable

    made = build_recipe(
        options.recipe, options.store, files=options.files, max_rows=options.max_rows, workers=options.workers,
        rebuild=options.rebuild, quiet=options.json,
    )  # fmt: skip
    artifact = made.artifacts[STAGE]
    ledger = read_ledger(artifact.path)
    folder = copy_out(artifact.path, Path(options.output)) if options.output else artifact.path
    if options.json:
        print_json({"path": str(folder), "key": artifact.record["key"], "ran": STAGE in made.ran, "ledger": ledger})
        return 0
    for line in summary_lines(ledger):
        print(printable(line))
    print(f"Build: {folder.resolve()}")
    if (folder / "preview.html").is_file():
        print(f"Page:  {(folder / 'preview.html').resolve()}")
    return 0


def copy_out(folder: Path, target: Path) -> Path:
    """Copy a build to ``target``, in one rename; an earlier build there is replaced, anything else refused."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target}: is a file; name a folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / "ledger.json").is_file():
        raise UserError(f"--output {target}: not empty, and not a build that could be replaced; name another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        shutil.copytree(folder, scratch / "new", ignore=shutil.ignore_patterns(*LEFT_HERE))
        if target.exists():
            target.rename(scratch / "old")
        (scratch / "new").rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def show(options: argparse.Namespace) -> int:
    """print rows as the model will see them: the rendered template, trained tokens in color"""
    from align.cli.data_show import show as printed

    return printed(options)


def lint(options: argparse.Namespace) -> int:
    """look for faults in the tokens a model would be trained on; exit code 1 where there are errors"""
    from align.cli.arguments import find_build, find_checkpoint, find_tokenizer_folder
    from align.lint.command import lint_dataset, print_findings

    found = find_build(options.recipe, options.store, options.workers)
    model = find_tokenizer_folder(options.model, options.store)
    findings = lint_dataset(
        found.folder, model, kind=options.kind, max_length=options.max_length, rows=options.rows, seed=options.seed,
        reward=find_checkpoint(options.reward, options.store) if options.reward else None,
    )  # fmt: skip
    if options.json:
        print_json([finding.to_json() for finding in findings])
        return int(any(finding.severity == "error" for finding in findings))
    return print_findings(findings)


def diff(options: argparse.Namespace) -> int:
    """compare two builds: rows added, removed, changed, moved between splits, and their ledgers"""
    from align.cli.data_diff import diff as compared

    return compared(options)


def push(options: argparse.Namespace) -> int:
    """upload a build to the Hugging Face Hub; --dry-run says what would go"""
    from align.cli.arguments import find_build
    from align.data.push import prepare
    from align.data.push import push as upload_now
    from align.errors import printable

    found = find_build(options.recipe, options.store, options.workers)
    upload = prepare(found.folder, options.repo, options.revision, options.private, options.all)
    concerns = upload.license.concerns
    summary: dict[str, Any] = {
        "repo": upload.repo, "revision": upload.revision or "main", "private": upload.private, "rows": upload.rows,
        "license": list(upload.license.names), "concerns": list(concerns),
        "files": [{"name": part.name, "bytes": part.size} for part in upload.parts],
    }  # fmt: skip
    if not options.json:
        _print_upload(upload, options.all)
    if options.dry_run:
        if options.json:
            print_json(summary | {"pushed": False})
        return 0
    if concerns and not options.yes:
        raise UserError(
            f"not pushed: {'; '.join(concerns)}. Give each source its license in the recipe, or say --yes where you "
            "may pass this data on."
        )
    done = upload_now(upload)
    if options.json:
        print_json(summary | {"pushed": True, **done})
        return 0
    for name in done["deleted"]:
        print(printable(f"deleted there: {name}"))
    print(f"Pushed: {printable(done['url'])}")
    return 0


def _print_upload(upload: Any, everything: bool) -> None:
    from align.errors import printable
    from align.report.wording import size

    visibility = "private" if upload.private else "public unless its owner's default says otherwise"
    print(f"To the Hub: datasets/{upload.repo}, {upload.revision or 'main'}, {visibility}")
    for part in upload.parts:
        print(f"  {size(part.size):>10}  {printable(part.name)}")
    kept = "" if everything else "; dropped rows and the preview page stay here (--all sends them too)"
    print(f"{len(upload.parts)} files, {size(upload.size)}{kept}")
    print(printable(f"License: {', '.join(upload.license.names)}. {upload.license.reason}"))
    for concern in upload.license.concerns:
        print(printable(f"! {concern}"))


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "build": build, "show": show, "lint": lint, "diff": diff, "push": push,
}  # fmt: skip


def add_commands(group: argparse.ArgumentParser) -> None:
    """The commands below ``align data`` and their options."""
    below = group.add_subparsers(dest="data_command", metavar="COMMAND", required=True, parser_class=Parser)
    made = {name: below.add_parser(name, help=function.__doc__) for name, function in COMMANDS.items()}
    for name, parser in made.items():
        if name == "diff":
            parser.add_argument("a", metavar="A", help="a build's folder, a recipe, or a key")
            parser.add_argument("b", metavar="B", help="the other one")
        else:
            words = "a recipe" if name == "build" else "a recipe, a build's folder, or a key"
            parser.add_argument("recipe", metavar="RECIPE", help=f"{words}, like data_recipes/embedded.yaml")
        parser.add_argument(
            "--workers", type=int, metavar="N", help="processes that build; by default the cores there are"
        )
        add_store(parser)
    _add_build(made["build"])
    _add_show(made["show"])
    _add_lint(made["lint"])
    made["diff"].add_argument("--examples", type=int, default=3, metavar="N", help="rows shown of each kind of change")
    _add_push(made["push"])


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", help="copy the build there, too")
    parser.add_argument("--files", nargs="+", metavar="PATH", help="local files in place of the recipe's sources")
    parser.add_argument("--max-rows", type=int, metavar="N", help="keep so many rows at most")
    parser.add_argument("--rebuild", action="store_true", help="build anew what is in the store already")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="MODEL", help="whose tokens: a folder, key, PIPELINE:STAGE, built-in or Hub name"
    )
    parser.add_argument("--split", default="train", help="train (default) or test")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="how many (default 3)")
    parser.add_argument("--start", type=int, default=1, metavar="N", help="number of the first one, counted from 1")
    parser.add_argument("--id", metavar="ID", help="only rows whose id begins so")
    parser.add_argument("--source", metavar="NAME", help="only rows of this source")
    parser.add_argument("--max-length", type=int, metavar="N", help="cut as a training stage with this max_length does")
    parser.add_argument("--page", metavar="FILE", help="write the preview page there instead, tokens in color")


def _add_lint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="a folder, key, PIPELINE:STAGE or built-in name"
    )
    parser.add_argument(
        "--kind", metavar="KIND", help="training that the rows are for (sft, dpo, reward, ppo), else found"
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="the training stage's max_length")
    parser.add_argument(
        "--rows", type=int, default=10_000, metavar="N", help="rows looked at per split (default 10000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws those rows")
    parser.add_argument(
        "--reward", metavar="CHECKPOINT", help="a reward model that is asked whether sides of pairs are swapped"
    )


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="owner/name on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made where there is none")
    parser.add_argument("--all", action="store_true", help="send dropped rows and the preview page, too")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    parser.add_argument("--yes", action="store_true", help="push although a license may forbid it")
