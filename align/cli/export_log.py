"""``align export-log STAGE``: write rollouts or evaluated answers as logs of inspect_ai or traces of trackio.

Has no heavy imports, and needs no torch when it runs.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from align.cli.arguments import find_artifact
from align.cli.parser import add_store, print_json, print_warning
from align.errors import UserError, printable
from align.store.artifacts import Artifact
from align.store.record import RECORD, read_artifact

RANGE = re.compile(r"(\d+)(?::(\d+))?")
VIEWERS = {"inspect": "inspect view --log-dir {}", "trackio": "TRACKIO_DIR={} trackio show"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align export-log``."""
    parser.add_argument(
        "stage", metavar="STAGE", help="a finished stage that samples or evaluates: PIPELINE:STAGE, a key, or a folder"
    )
    parser.add_argument("--format", choices=list(VIEWERS), default="inspect", help="inspect (default) or trackio")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the logs")
    parser.add_argument("--updates", metavar="FIRST:LAST", help="updates to write, such as 40:50 (default: all)")
    parser.add_argument(
        "--validations", action="store_true", help="write the responses to held-out prompts instead of the rollouts"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="conversations of each log (default: all)")
    add_store(parser)


def run(options: argparse.Namespace) -> int:
    """Run ``align export-log``."""
    from align.export.export_log import export_log

    updates = parse_updates(options.updates)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: should be 1 or more.")
    artifact = _find_stage(options.stage, options.store)
    written = export_log(
        artifact,
        options.output,
        options.format,
        validations=options.validations,
        updates=updates,
        limit=options.limit,
        notify=print_warning,
    )
    if options.json:
        paths = [str(path) for path in written.paths]
        print_json({"stage": artifact.stage, "conversations": written.conversations, "paths": paths})
        return 0
    print(printable(f"{written.conversations} conversations of {artifact.stage} in {options.output}"))
    print(printable(f"See them with: {VIEWERS[options.format].format(options.output)}"))
    return 0


def parse_updates(text: str | None) -> range | None:
    """Return the updates of ``FIRST:LAST`` or of a single number; None without a text."""
    if text is None:
        return None
    match = RANGE.fullmatch(text)
    first = int(match[1]) if match else 1
    last = int(match[2] or match[1]) if match else 0
    if last < first:
        raise UserError(f"--updates {text}: should be two numbers in order, such as 40:50, or one.")
    return range(first, last + 1)


def _find_stage(word: str, store: str | None) -> Artifact:
    folder = Path(word)
    return read_artifact(folder) if (folder / RECORD).is_file() else find_artifact(word, store)
