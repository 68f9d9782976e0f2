"""``align data build|columns|show|lint|diff|push``: build, inspect and publish datasets. Has no heavy imports."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import Parser, add_store, import_late, print_json
from align.errors import UserError, printable

if TYPE_CHECKING:
    from align.data.push import Upload

NOT_COPIED = ("log.txt", "events.jsonl")
"""Files of an artifact about its build, not about the data; they are not copied out."""


def run(options: argparse.Namespace) -> int:
    """Run ``align data``."""
    return COMMANDS[options.data_command][1](options)


def build(options: argparse.Namespace) -> int:
    """Run ``align data build``."""
    from align.cli.arguments import STAGE, build_recipe
    from align.data.builds.build_files import read_ledger
    from align.data.builds.ledger import summary_lines

    target = Path(options.output) if options.output else None
    if target is not None:
        refuse_target(target)
    run = build_recipe(
        options.recipe,
        options.store,
        files=options.files,
        max_rows=options.max_rows,
        workers=options.workers,
        rebuild=options.rebuild,
        quiet=options.json,
    )
    artifact = run.artifacts[STAGE]
    ledger = read_ledger(artifact.path)
    folder = artifact.path if target is None else copy_out(artifact.path, target)
    if options.json:
        print_json({"path": str(folder), "key": artifact.record["key"], "ran": STAGE in run.ran, "ledger": ledger})
        return 0
    for line in summary_lines(ledger):
        print(printable(line))
    print(f"Build: {folder.resolve()}")
    if (folder / "preview.html").is_file():
        print(f"Page:  {(folder / 'preview.html').resolve()}")
    return 0


def refuse_target(target: Path) -> None:
    """Raise ``UserError`` for an unsuitable target: a file, a full folder that is not a build, the current folder."""
    from align.cli.arguments import refuse_current_folder

    refuse_current_folder(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target}: is a file; name a folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / "ledger.json").is_file():
        raise UserError(f"--output {target}: not empty, and not a build that can be replaced; name another folder.")


def copy_out(folder: Path, target: Path) -> Path:
    """Copy a build to ``target`` and return ``target``; an earlier build there is replaced.

    The copy is complete before one rename puts it in place.
    """
    refuse_target(target)  # again, because the build may have been slow
    target.parent.mkdir(parents=True, exist_ok=True)
    # The folder is next to the target, so both moves are renames on one disk.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        shutil.copytree(folder, scratch / "new", ignore=shutil.ignore_patterns(*NOT_COPIED))
        # The earlier build is moved aside before the new build replaces it, and deleted with the scratch folder.
        if target.exists():
            target.rename(scratch / "old")
        (scratch / "new").rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def lint(options: argparse.Namespace) -> int:
    """Run ``align data lint``."""
    from align.cli.arguments import find_build, find_checkpoint, find_tokenizer_folder
    from align.lint.findings import format_findings, has_errors
    from align.lint.trainer import lint_dataset

    source = find_build(options.recipe, options.store, options.workers)
    model = find_tokenizer_folder(options.model, options.store)
    findings = lint_dataset(
        source.folder,
        model,
        kind=options.kind,
        max_length=options.max_length,
        rows=options.rows,
        seed=options.seed,
        reward=find_checkpoint(options.reward, options.store) if options.reward else None,
        thinking=options.thinking,
    )
    if options.json:
        print_json([finding.to_json() for finding in findings])
    else:
        print(format_findings(findings))
    return int(has_errors(findings))


def push(options: argparse.Namespace) -> int:
    """Run ``align data push``."""
    from align.cli.arguments import find_build
    from align.data.push import prepare
    from align.data.push import push as upload_build

    source = find_build(options.recipe, options.store, options.workers)
    upload = prepare(source.folder, options.repo, options.revision, options.private, options.all)
    concerns = upload.license.concerns
    if not options.json:
        left_out = "" if options.all else "; dropped rows and the preview page stay here (--all sends them too)"
        print_upload(upload, f"datasets/{upload.repo}", left_out)
    if options.dry_run:
        if options.json:
            print_json({**upload.to_json(), "pushed": False})
        return 0
    if concerns and not options.yes:
        raise UserError(
            f"not pushed: {'; '.join(concerns)}. Give each source its license in the recipe, or use --yes if you may "
            "pass this data on."
        )
    result = upload_build(upload)
    if options.json:
        print_json({**upload.to_json(), "pushed": True, **result})
    else:
        print_pushed(result)
    return 0


def print_upload(upload: Upload, address: str, left_out: str = "") -> None:
    """Print what an upload to the Hub would send to ``address``: files, sizes, license and concerns about it."""
    from align.report.page.number_format import size

    visibility = "private" if upload.private else "public unless its owner's default says otherwise"
    print(f"To the Hub: {address}, {upload.revision or 'main'}, {visibility}")
    for part in upload.parts:
        print(f"  {size(part.size):>10}  {printable(part.name)}")
    print(f"{len(upload.parts)} files, {size(upload.size)}{left_out}")
    print(printable(f"License: {', '.join(upload.license.names)}. {upload.license.reason}"))
    for concern in upload.license.concerns:
        print(printable(f"! {concern}"))


def print_pushed(result: dict[str, Any]) -> None:
    """Print what a push deleted on the Hub, and its address."""

    for name in result["deleted"]:
        print(printable(f"deleted on the Hub: {name}"))
    print(f"Pushed: {printable(result['url'])}")


COMMANDS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "columns": (
        "show the columns of a file, and print the recipe that reads it",
        import_late("align.cli.data_show:columns"),
    ),
    "build": ("build a recipe into the store, unless it is there; a killed build resumes", build),
    "show": (
        "show rows as a model sees them: the rendered template, with trained tokens in color",
        import_late("align.cli.data_show:show"),
    ),
    "lint": ("check the tokens that a model would be trained on; exit code 1 if there are errors", lint),
    "diff": (
        "compare two builds: rows added, removed, changed or moved between splits, and their ledgers",
        import_late("align.cli.data_diff:diff"),
    ),
    "push": ("upload a build to the Hugging Face Hub; --dry-run shows what would be sent", push),
}


def add_arguments(group: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``align data`` and their options."""
    subparsers = group.add_subparsers(dest="data_command", metavar="COMMAND", required=True, parser_class=Parser)
    parsers = {name: subparsers.add_parser(name, help=purpose) for name, (purpose, _) in COMMANDS.items()}
    _add_columns(parsers["columns"])
    for name, parser in parsers.items():
        if name == "columns":
            continue  # it reads a file, not a build
        if name == "diff":
            parser.add_argument("a", metavar="A", help="a build's folder, a recipe, or a key")
            parser.add_argument("b", metavar="B", help="the other build")
        else:
            words = "a recipe" if name == "build" else "a recipe, a build's folder, or a key"
            parser.add_argument("recipe", metavar="RECIPE", help=f"{words}, like data_recipes/embedded.yaml")
        parser.add_argument("--workers", type=int, metavar="N", help="processes that build (default: one per core)")
        add_store(parser)
    _add_build(parsers["build"])
    _add_show(parsers["show"])
    _add_lint(parsers["lint"])
    parsers["diff"].add_argument("--examples", type=int, default=3, metavar="N", help="rows to show of each change")
    _add_push(parsers["push"])


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="files of records: .json, .jsonl, .csv, .tsv, .parquet"
    )
    parser.add_argument(
        "--records", metavar="KEY", help="key of a .json file that holds the records, like data.examples"
    )
    parser.add_argument("--header", metavar="NAMES", help="names of a .csv file's columns, with commas between them")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", help="also copy the build there")
    parser.add_argument("--files", nargs="+", metavar="PATH", help="local files in place of the recipe's sources")
    parser.add_argument("--max-rows", type=int, metavar="N", help="keep at most N rows")
    parser.add_argument("--rebuild", action="store_true", help="build again what is in the store already")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="MODEL", help="show its tokens: a folder, key, PIPELINE:STAGE, built-in or Hub name"
    )
    parser.add_argument("--split", default="train", help="train (default) or test")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="number of rows (default 3)")
    parser.add_argument("--start", type=int, default=1, metavar="N", help="number of the first row, counted from 1")
    parser.add_argument("--id", metavar="ID", help="only rows whose id begins with ID")
    parser.add_argument("--source", metavar="NAME", help="only rows of this source")
    parser.add_argument("--max-length", type=int, metavar="N", help="cut rows as training with this max_length would")
    parser.add_argument("--page", metavar="FILE", help="write the preview page there instead, with tokens in color")


def _add_lint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="a folder, key, PIPELINE:STAGE or built-in name"
    )
    parser.add_argument(
        "--kind",
        metavar="KIND",
        help="kind of training stage (sft, dpo, reward, ppo, or module:NAME of your own); by default from the rows",
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="the training stage's max_length")
    parser.add_argument("--rows", type=int, default=10_000, metavar="N", help="rows to check per split (default 10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed that draws those rows")
    parser.add_argument("--thinking", choices=("on", "off"), help="thinking switch of the chat template, as in a stage")
    parser.add_argument(
        "--reward", metavar="CHECKPOINT", help="a reward model that checks whether sides of pairs are swapped"
    )


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", metavar="REPO", help="owner/name on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; it is created if needed")
    parser.add_argument("--all", action="store_true", help="also send dropped rows and the preview page")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
    parser.add_argument("--yes", action="store_true", help="push even if a license may forbid it")
