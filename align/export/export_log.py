"""Writes rollouts or evaluated answers for the viewers of other projects: inspect_ai and trackio. Torch-free.

Both packages are optional. ``constraints.txt`` pins newer versions of some of their requirements, so they may be in
another environment than vLLM.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from align.errors import UserError
from align.export.transcripts import read_logs
from align.store.artifacts import Artifact

Format = Literal["inspect", "trackio"]
PACKAGES: dict[Format, str] = {"inspect": "inspect_ai", "trackio": "trackio"}
"""Format -> package that writes it; the extra has the format's name."""


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
        from align.export.trackio_traces import write_traces

        project = re.sub(r"[^\w.-]+", "-", str(artifact.record.get("pipeline") or "align"))
        count = write_traces(chain([first], logs), output, project, f"{artifact.stage}-{artifact.key[:12]}")
        return LogExport(count, [output])
    from align.export.inspect_logs import write_inspect_log

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
