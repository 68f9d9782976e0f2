"""``align export-log STAGE``: rollouts or evaluated answers for the viewers inspect_ai and trackio. Torch-free.

Both packages are optional. ``constraints.txt`` pins newer versions of some of their requirements, so they may be in
another environment than vLLM.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from align.cli.arguments import find_artifact
from align.cli.parser import add_store, print_json, print_warning
from align.errors import UserError, printable
from align.extensions.logs.transcripts import read_logs
from align.store.artifacts import Artifact
from align.store.record import RECORD, read_artifact

Format = Literal["inspect", "trackio"]
PACKAGES: dict[Format, str] = {"inspect": "inspect_ai", "trackio": "trackio"}
"""Format -> package that writes it; the extra has the format's name."""
RANGE = re.compile(r"(\d+)(?::(\d+))?")
VIEWERS = {"inspect": "inspect view --log-dir {}", "trackio": "TRACKIO_DIR={} trackio show"}


@dataclass(frozen=True)
class LogExport:
    """The files that an export wrote; trackio's only entry is its folder."""

    conversations: int
    paths: list[Path]


def export_log(
    artifact: Artifact,
    folder: str | Path,
    form: Format = "inspect",
    *,
    validations: bool = False,
    updates: range | None = None,
    limit: int | None = None,
    notify: Callable[[str], None] | None = None,
) -> LogExport:
    """Write the conversations of a stage that samples or evaluates.

    Args:
        artifact: A finished stage.
        folder: Folder of the logs, which is made.
        form: ``inspect`` writes a log for each update, or for each task and system of an evaluation. ``trackio`` writes
            one run with a step for each of these.
        validations: Write the responses to held-out prompts instead of those that the stage learned from.
        updates: Updates to write; by default all.
        limit: Highest number of conversations in a log.
        notify: Is told of tasks that store no answers.

    Raises:
        UserError: The package is not installed, the stage has no conversations, or trackio has the run already.
    """
    output = Path(folder)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder.")
    _require_package(form)
    logs = read_logs(artifact, validations=validations, updates=updates, limit=limit, notify=notify)
    # The first log is read before the folder is made: a stage without a log leaves no folder behind.
    first = next(logs, None)
    if first is None:
        raise UserError(f"{artifact.stage}: has no conversations to write.")
    output.mkdir(parents=True, exist_ok=True)
    if form == "trackio":
        from align.extensions.logs.trackio_traces import write_traces

        project = re.sub(r"[^\w.-]+", "-", str(artifact.record.get("pipeline") or "align"))
        count = write_traces(chain([first], logs), output, project, f"{artifact.stage}-{artifact.key[:12]}")
        return LogExport(count, [output])
    from align.extensions.logs.inspect_logs import write_inspect_log

    count = 0
    paths = []
    for log in chain([first], logs):
        paths.append(write_inspect_log(log, output))
        count += len(log.transcripts)
    return LogExport(count, paths)


def _require_package(form: Format) -> None:
    package = PACKAGES[form]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{package} is not installed. `pip install 'align-pipeline[{form}]'` installs it, without constraints.txt, "
            "or into another environment: `align export-log` needs no torch."
        )


# ---- the command ----


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
