"""``align export CHECKPOINT``: an ordinary model folder, checked and described, and on the Hub if asked for.

Imports nothing heavy before the checkpoint, the folder and the Hub's name are known to be right.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.arguments import find_checkpoint
from align.cli.lineage import find_base, find_scorecard, lineage, pipeline_of, record_of, refuse_damage
from align.cli.parser import add_store, print_json
from align.config.user_paths import user_path
from align.errors import StageFailed, UserError, explain_os_error
from align.export.export import ADAPTER, Source, check_source, read_json
from align.store.artifacts import Artifact
from align.store.marker import MARKER

if TYPE_CHECKING:
    from align.export.model_card_facts import Facts
    from align.export.push import ModelUpload


@dataclass(frozen=True)
class Chosen:
    """What the command line means."""

    source: Source
    artifact: Artifact | None
    note: str | None
    """What could not be checked about an adapter's base."""


def run(options: argparse.Namespace) -> int:
    """write a checkpoint as an ordinary model folder, check that it answers alike, describe it; --push to the Hub"""
    say: Callable[[str], None] = (lambda text: print(text, file=sys.stderr)) if options.json else print
    chosen = choose(options.checkpoint, options.base, options.store)
    output = Path(options.output)
    _refuse_output(output)
    check_source(chosen.source)
    known = _known(options, chosen, output)
    if chosen.note:
        say(f"note: {chosen.note}")
    scratch = _scratch(output)
    try:
        facts = _write(chosen.source, scratch, options, known, say)
        if output.is_dir():
            output.rmdir()  # empty: checked above
        (scratch / "new").rename(output)
    except StageFailed as error:
        raise StageFailed(f"{error}\nNothing was written; --no-check writes the folder all the same.") from None
    except OSError as error:
        raise StageFailed(explain_os_error(error, output.resolve().parent)) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    summary = _summary(output, chosen, facts)
    if not options.json:
        _print_summary(output, facts)
    if options.push:
        summary["push"] = _push(options, output, facts)
    if options.json:
        print_json(summary)
    return 0


def choose(word: str, base: str | None, store: str | None) -> Chosen:
    """The checkpoint that ``word`` means, with an adapter's base; ``UserError`` for none.

    ``word`` is what ``find_checkpoint`` takes, or the folder of an adapter.
    """
    folder = user_path(word)
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        recorded = str(read_json(folder / ADAPTER).get("base_model_name_or_path") or "")
        given = None if base is None else find_checkpoint(base, store)
        found, note = find_base(folder, recorded, given)
        for part in (folder, found):
            refuse_damage(part, thorough=True)
        return Chosen(Source(found, folder), record_of(folder), note)
    if base is not None:
        raise UserError(f"--base is for adapters, and {word} has no {ADAPTER}.")
    found = find_checkpoint(word, store)
    refuse_damage(found, thorough=True)
    return Chosen(Source(found), record_of(found), None)


def _refuse_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a new folder.")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output}: not empty; name a new folder.")
    for parent in output.resolve().parents:
        if (parent / MARKER).is_file():
            raise UserError(
                f"--output {output}: inside the store {parent}, which would take it for its own; name another."
            )


def _scratch(output: Path) -> Path:
    """A folder beside the output, so that the finished one is moved in one rename."""
    try:
        output.resolve().parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.resolve().parent))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error}).") from None


def _known(options: argparse.Namespace, chosen: Chosen, output: Path) -> dict[str, Any]:
    """What the card says that needs no model; refuses a push that is bound to fail or that a license may forbid."""
    from align.data.push import check_repo
    from align.export.model_card_facts import license_of

    if options.push is None and (options.private or options.revision or options.dry_run):
        raise UserError("--private, --revision and --dry-run are about --push REPO; name one.")
    ancestors = [] if chosen.artifact is None else lineage(chosen.artifact)
    license = license_of(ancestors, options.license)
    if options.push is not None:
        check_repo(options.push, "model")
        if license.concerns and not (options.yes or options.dry_run or options.license):
            raise UserError(
                f"not exported: {'; '.join(license.concerns)}. State the model's with --license, or say --yes where "
                "you may pass it on."
            )
    measured = find_scorecard(chosen.artifact, options.scorecard, options.store)
    return {
        "name": options.push.rpartition("/")[2] if options.push else output.resolve().name,
        "lineage": ancestors,
        "pipeline": None if chosen.artifact is None else pipeline_of(chosen.artifact),
        "scorecard": None if measured is None else measured[0],
        "scored_by": None if measured is None else measured[1],
        "license": options.license,
    }


def _write(
    source: Source, scratch: Path, options: argparse.Namespace, known: dict[str, Any], say: Callable[[str], None]
) -> Facts:
    """The folder in ``scratch/new``, checked and with its card."""
    from transformers.utils import logging

    from align.export.export import export
    from align.export.model_card import write_model_card
    from align.export.model_card_facts import Facts
    from align.export.verify import check

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    written = export(source, scratch / "new", options.dtype)
    agreement = None
    if not options.no_check:
        agreement = check(source, scratch / "new", written.dtype, scratch / "check", say=say)
    facts = Facts(written=written, agreement=agreement, **known)
    write_model_card(scratch / "new", facts)
    return facts


def _summary(output: Path, chosen: Chosen, facts: Facts) -> dict[str, Any]:
    return {
        "path": str(output), "key": None if chosen.artifact is None else chosen.artifact.key,
        "dtype": facts.written.dtype, "parameters": facts.written.parameters, "files": facts.written.files,
        "checked": None if facts.agreement is None else vars(facts.agreement),
        "scorecard": None if facts.scored_by is None else facts.scored_by.key, "base_unchecked": chosen.note,
    }  # fmt: skip


def _print_summary(output: Path, facts: Facts) -> None:
    from align.report.wording import size

    written, found = facts.written, facts.agreement
    print(f"Written: {output.resolve()}  {size(sum(written.files.values()))}, {written.dtype}, {written.architecture}")
    if found is None:
        print("Not checked (--no-check): whether it answers as the checkpoint does.")
    else:
        print(
            f"Checked: {found.compared} {found.what} of {found.prompts} prompts are the checkpoint's in "
            f"{' and '.join(found.engines)}; largest gap {found.largest_gap:.2g}"
        )
        if found.ties:
            print(f"  {found.ties} answers part at two tokens of equal probability")
        if found.rounding:
            print(f"  {written.dtype} changes {found.rounding} of {found.prompts} answers by rounding alone")
        if found.unchecked:
            print(f"! Not checked in vLLM: {found.unchecked}")
    by = facts.scored_by
    measured = "no evaluation found" if by is None else f"results of {by.stage} ({by.key[:12]})"
    print(f"Card: {output / 'README.md'}, {measured}")


def _push(options: argparse.Namespace, output: Path, facts: Facts) -> dict[str, Any]:
    from align.errors import printable
    from align.export.model_card_facts import license_of
    from align.export.push import prepare, push

    license = license_of(facts.lineage, facts.license)
    upload = prepare(output, options.push, license, options.revision, options.private)
    summary: dict[str, Any] = {
        "repo": upload.repo, "revision": upload.revision or "main", "private": upload.private, "pushed": False,
        "license": list(license.names), "concerns": list(license.concerns),
        "files": [{"name": part.name, "bytes": part.size} for part in upload.parts],
    }  # fmt: skip
    if not options.json:
        _print_upload(upload)
    if options.dry_run:
        return summary
    done = push(upload, f"{facts.name}, exported with align")
    if not options.json:
        for name in done["deleted"]:
            print(printable(f"deleted there: {name}"))
        print(f"Pushed: {printable(done['url'])}")
    return summary | {"pushed": True, **done}


def _print_upload(upload: ModelUpload) -> None:
    from align.errors import printable
    from align.report.wording import size

    visibility = "private" if upload.private else "public unless its owner's default says otherwise"
    print(f"To the Hub: {upload.repo}, {upload.revision or 'main'}, {visibility}")
    for part in upload.parts:
        print(f"  {size(part.size):>10}  {printable(part.name)}")
    print(f"{len(upload.parts)} files, {size(upload.size)}")
    print(printable(f"License: {', '.join(upload.license.names)}. {upload.license.reason}"))
    for concern in upload.license.concerns:
        print(printable(f"! {concern}"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``align export``."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a folder (an adapter's too), a key, or PIPELINE:STAGE"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="type of the weights; by default their own")
    parser.add_argument("--base", metavar="CHECKPOINT", help="what an adapter is merged onto, if not what it names")
    parser.add_argument("--scorecard", metavar="KEY", help="evaluation for the card; by default the newest that fits")
    parser.add_argument("--license", metavar="NAME", help="state the model's license, like apache-2.0")
    parser.add_argument("--no-check", action="store_true", help="do not compare its answers with the checkpoint's")
    parser.add_argument("--push", metavar="REPO", help="upload to owner/name on the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="make that repository private; refuse a public one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made where there is none")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, say what would be sent, send nothing")
    parser.add_argument("--yes", action="store_true", help="push although a license may forbid it")
    add_store(parser)
