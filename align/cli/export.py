"""``align export CHECKPOINT``: write an ordinary model folder, check it, describe it, and upload it on request.

Nothing heavy is imported before the checkpoint, the folder and the Hub's name have been checked.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.arguments import find_checkpoint, refuse_current_folder
from align.cli.export_formats import FormatOptions, add_format_arguments, check_format, write_adapter, write_format
from align.cli.lineage import find_base, find_scorecard, lineage, pipeline_of, record_of, refuse_damage
from align.cli.parser import add_store, print_json
from align.config.user_paths import user_path
from align.errors import StageFailed, UserError, explain_os_error, printable
from align.export.export import Source, check_source, read_json
from align.models.checkpoints.files import ADAPTER_CONFIG
from align.store.artifacts import Artifact, Kind
from align.store.record import MARKER

if TYPE_CHECKING:
    from align.export.model_card_facts import Facts


@dataclass(frozen=True)
class ExportSource:
    """A checkpoint to export, and its artifact if it has one."""

    source: Source
    artifact: Artifact | None
    note: str | None
    """Missing checks of an adapter's base; None if all checks were possible."""


def run(options: argparse.Namespace) -> int:
    """Run ``align export``."""
    log: Callable[[str], None] = (lambda text: print(text, file=sys.stderr)) if options.json else print
    chosen = find_source(options.checkpoint, options.base, options.store)
    merged = None
    if options.format == "lora":
        chosen, merged = _with_adapter(chosen, options)
    output = Path(options.output)
    _refuse_output(output)
    check_source(chosen.source)
    card_facts = _card_facts(options, chosen, output)
    format_options = check_format(options, chosen.source, card_facts, merged)
    if chosen.note:
        log(f"note: {chosen.note}")
    # Everything is written and checked in a folder next to the output, which then replaces it in one rename.
    scratch = _scratch(output)
    try:
        if format_options is None:
            facts = _write(chosen.source, scratch, options, card_facts, log)
        else:
            facts = _write_format(chosen.source, scratch, format_options, card_facts, log)
        if output.is_dir():
            output.rmdir()  # it is empty: _refuse_output has checked that
        (scratch / "new").rename(output)
    except StageFailed as error:
        raise StageFailed(f"{error}\nNothing was written; --no-check writes the folder without this check.") from None
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


def find_source(word: str, base: str | None, store: str | None) -> ExportSource:
    """Return the checkpoint that ``word`` names, with an adapter's base; raise ``UserError`` if it names none.

    ``word`` is the folder of an adapter, or anything that ``find_checkpoint`` accepts.
    """
    folder = user_path(word)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        recorded = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        chosen_base = None if base is None else find_checkpoint(base, store)
        base_folder, note = find_base(folder, recorded, chosen_base)
        for part in (folder, base_folder):
            refuse_damage(part, thorough=True)
        return ExportSource(Source(base_folder, folder), record_of(folder), note)
    if base is not None:
        raise UserError(f"--base is for adapters, and {word} has no {ADAPTER_CONFIG}.")
    checkpoint = find_checkpoint(word, store)
    refuse_damage(checkpoint, thorough=True)
    return ExportSource(Source(checkpoint), record_of(checkpoint), None)


def _refuse_output(output: Path) -> None:
    refuse_current_folder(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a new folder.")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output}: not empty; name a new folder.")
    # A store treats every folder inside it as an artifact.
    for parent in output.resolve().parents:
        if (parent / MARKER).is_file():
            raise UserError(
                f"--output {output}: inside the store {parent}, which would treat it as its own; name another."
            )


def _scratch(output: Path) -> Path:
    """Create a folder next to the output, from which the finished result is moved with one rename."""
    try:
        output.resolve().parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.resolve().parent))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error}).") from None


def _card_facts(options: argparse.Namespace, chosen: ExportSource, output: Path) -> dict[str, Any]:
    """Return the facts for the model card that need no model.

    Raises ``UserError`` for a push that is bound to fail, or that a license may forbid.
    """
    from align.data.push import check_repo
    from align.export.model_card_facts import license_of

    if options.push is None and (options.private or options.revision or options.dry_run):
        raise UserError("--private, --revision and --dry-run go with --push REPO; name one.")
    # Licenses are inherited: the model's depends on everything that it was produced from.
    ancestors = [] if chosen.artifact is None else lineage(chosen.artifact)
    license = license_of(ancestors, options.license)
    if options.push is not None:
        check_repo(options.push, "model")
        if license.concerns and not (options.yes or options.dry_run or options.license):
            raise UserError(
                f"not exported: {'; '.join(license.concerns)}. State the model's license with --license, or use "
                "--yes if you may pass it on."
            )
    scorecard = find_scorecard(chosen.artifact, options.scorecard, options.store)
    return {
        "name": options.push.rpartition("/")[2] if options.push else output.resolve().name,
        "lineage": ancestors,
        "pipeline": None if chosen.artifact is None else pipeline_of(chosen.artifact),
        "scorecard": None if scorecard is None else scorecard[0],
        "scored_by": None if scorecard is None else scorecard[1],
        "license": options.license,
    }


def _write(
    source: Source, scratch: Path, options: argparse.Namespace, card_facts: dict[str, Any], log: Callable[[str], None]
) -> Facts:
    """Write the folder ``scratch/new``, check it and add its card."""
    from align.export.export import export, file_sizes, silence_transformers
    from align.export.model_card import write_model_card
    from align.export.model_card_facts import Facts, weight_history
    from align.export.verify import verify
    from align.models.checkpoints.multimodal import join, rest_of

    silence_transformers()
    written = export(source, scratch / "new", options.dtype)
    agreement = None
    if not options.no_check:
        agreement = verify(source, scratch / "new", written.dtype, scratch / "check", log=log)
    rest = rest_of(weight_history(card_facts["lineage"]))
    if rest is not None and not written.is_reward:
        written = replace(written, architecture=join(rest, scratch / "new"), files=file_sizes(scratch / "new"))
    facts = Facts(written=written, agreement=agreement, **card_facts)
    write_model_card(scratch / "new", facts)
    return facts


def _with_adapter(chosen: ExportSource, options: argparse.Namespace) -> tuple[ExportSource, Path | None]:
    """Return the source with the adapter that a checkpoint was trained with, and the merged checkpoint, if it has one.

    Raises ``UserError`` for a checkpoint without an adapter, or with an adapter that vLLM does not load.
    """
    from align.export.lora import require_adapter

    adapter = require_adapter(chosen.source)
    merged = adapter.folder.resolve().parent / "model"
    if chosen.source.adapter is None:
        chosen = find_source(str(adapter.folder), options.base, options.store)
    return chosen, merged if (merged / "config.json").is_file() else None


def _write_format(
    source: Source, scratch: Path, options: FormatOptions, card_facts: dict[str, Any], log: Callable[[str], None]
) -> Facts:
    """Write the folder ``scratch/new`` in another format, measure its cost and add its card."""
    from align.export.export import file_sizes, silence_transformers
    from align.export.model_card import write_model_card
    from align.export.model_card_facts import Facts, base_model

    silence_transformers()
    agreement = None
    fidelity = None
    if options.format == "lora":
        artifact = record_of(source.folder)
        name = base_model(card_facts["lineage"]) if artifact is None or artifact.kind == Kind.MODEL else None
        if name is None:
            name = source.folder.resolve().name if artifact is None else f"{artifact.stage}-{artifact.key[:12]}"
        written, agreement = write_adapter(source, scratch, replace(options, base_name=name), log)
    else:
        written, fidelity = write_format(source, scratch, options, log)
    facts = Facts(written=written, agreement=agreement, fidelity=fidelity, **card_facts)
    write_model_card(scratch / "new", facts)
    return replace(facts, written=replace(written, files=file_sizes(scratch / "new")))


def _summary(output: Path, chosen: ExportSource, facts: Facts) -> dict[str, Any]:
    return {
        "path": str(output),
        "key": None if chosen.artifact is None else chosen.artifact.key,
        "dtype": facts.written.dtype,
        "parameters": facts.written.parameters,
        "files": facts.written.files,
        "format": facts.written.format,
        "checked": None if facts.agreement is None else vars(facts.agreement),
        "cost": None if facts.fidelity is None else asdict(facts.fidelity),
        "scorecard": None if facts.scored_by is None else facts.scored_by.key,
        "base_unchecked": chosen.note,
    }


def _print_summary(output: Path, facts: Facts) -> None:
    from align.report.page.number_format import size

    written = facts.written
    print(f"Written: {output.resolve()}  {size(sum(written.files.values()))}, {written.dtype}, {written.architecture}")
    _print_agreement(facts)
    evaluation = facts.scored_by
    results = "no evaluation found" if evaluation is None else f"results of {evaluation.stage} ({evaluation.key[:12]})"
    print(f"Card: {output / 'README.md'}, {results}")


def _print_agreement(facts: Facts) -> None:
    """Print how the exported model's answers agree with the checkpoint's."""
    from align.export.fidelity import cost_summary

    agreement = facts.agreement
    if facts.fidelity is not None:
        print(cost_summary(facts.fidelity))
        if facts.fidelity.unchecked is not None:
            print(f"! Not checked: {printable(facts.fidelity.unchecked)}")
        return
    if agreement is None:
        print("Not checked (--no-check): whether its answers agree with the checkpoint's.")
        return
    print(
        f"Checked: {agreement.compared} {agreement.what} of {agreement.prompts} prompts agree with the checkpoint's in "
        f"{' and '.join(agreement.engines)}; largest gap {agreement.largest_gap:.2g}"
    )
    if agreement.ties:
        print(f"  {agreement.ties} answers differ from a point where two tokens are equally probable")
    if agreement.rounding:
        print(f"  {facts.written.dtype} changes {agreement.rounding} of {agreement.prompts} answers by rounding alone")
    if agreement.unchecked:
        print(f"! Not checked in vLLM: {printable(agreement.unchecked)}")


def _push(options: argparse.Namespace, output: Path, facts: Facts) -> dict[str, Any]:
    """Upload the folder to the Hub, or only print what would be sent with ``--dry-run``; return its summary."""
    from align.cli.data import print_pushed, print_upload
    from align.export.export import prepare, push
    from align.export.model_card_facts import license_of

    license = license_of(facts.lineage, facts.license)
    upload = prepare(output, options.push, license, options.revision, options.private)
    if not options.json:
        print_upload(upload, upload.repo)
    if options.dry_run:
        return {**upload.to_json(), "pushed": False}
    result = push(upload, f"{facts.name}, exported with align")
    if not options.json:
        print_pushed(result)
    return {**upload.to_json(), "pushed": True, **result}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align export``."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a folder (an adapter's too), a key, or PIPELINE:STAGE"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; it must be new or empty")
    add_format_arguments(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype of the weights (default: as they are)")
    parser.add_argument("--base", metavar="CHECKPOINT", help="base model of an adapter, if not the one it names")
    parser.add_argument("--scorecard", metavar="KEY", help="evaluation for the card (default: the newest that fits)")
    parser.add_argument("--license", metavar="NAME", help="the model's license, like apache-2.0")
    parser.add_argument("--no-check", action="store_true", help="do not compare the answers with the checkpoint's")
    parser.add_argument("--push", metavar="REPO", help="upload to owner/name on the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="make that repository private; refuse a public one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; it is created if needed")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, show the upload, send nothing")
    parser.add_argument("--yes", action="store_true", help="push even if a license may forbid it")
    add_store(parser)
