"""Writes transcripts as traces of trackio, with its own classes, into a folder. Torch-free.

``TRACKIO_DIR=FOLDER trackio show --project PIPELINE`` shows them. Nothing is sent to a Space or a server, even if
trackio's variables name such a place.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.extensions.logs.transcripts import Message, Transcript, TranscriptLog, read_calls

if TYPE_CHECKING:
    from trackio import Trace

FOLDER = "TRACKIO_DIR"
REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL", "TRACKIO_BUCKET_ID")
"""Variables that name a place on another machine."""
KEY = "transcript"


def write_traces(logs: Iterable[TranscriptLog], folder: Path, project: str, run: str) -> int:
    """Write all logs as one run of a trackio project, a step for each update; return the number of traces.

    Args:
        logs: Logs of one stage.
        folder: trackio's folder, which may have other runs.
        project: Project of trackio.
        run: Name of the run.

    Raises:
        UserError: The project already has that run, or trackio was loaded with another folder.
    """
    # trackio prints on standard output, which may be a JSON document.
    with _local_folder(folder), contextlib.redirect_stdout(sys.stderr):
        import trackio

        if _has_run(project, run):
            raise UserError(f"{folder}: project '{project}' has a run '{run}'; name another folder with --output.")
        trackio.init(project=project, name=run, embed=False, auto_log_gpu=False, auto_log_cpu=False)
        count = 0
        try:
            for number, log in enumerate(logs):
                step = number if log.update is None else log.update
                traces = [make_trace(transcript, log) for transcript in log.transcripts]
                trackio.log({KEY: traces, **log.means()}, step=step)
                count += len(log.transcripts)
        finally:
            trackio.finish()
        return count


def _has_run(project: str, run: str) -> bool:
    import trackio

    try:
        return any(existing.name == run for existing in trackio.Api().runs(project))
    except ValueError:  # there is no such project
        return False


@contextlib.contextmanager
def _local_folder(folder: Path) -> Iterator[None]:
    """Set trackio's variables, so that it writes into a folder and to no other machine."""
    place = str(folder.resolve())
    if "trackio" in sys.modules and os.environ.get(FOLDER) != place:
        raise UserError(f"trackio reads ${FOLDER} when it is imported, which has happened; set it to {place} first.")
    before = {name: os.environ.get(name) for name in (FOLDER, *REMOTE)}
    try:
        for name in REMOTE:
            os.environ.pop(name, None)
        os.environ[FOLDER] = place
        yield
    finally:
        for name, value in before.items():
            if value is None and name != FOLDER:
                os.environ.pop(name, None)
            elif value is not None:
                os.environ[name] = value


def make_trace(transcript: Transcript, log: TranscriptLog) -> Trace:
    """Return a transcript as a trace of trackio, whose metadata has the scores, their reasons and the facts."""
    import trackio

    status = "error" if transcript.failure else "ok"
    metadata: dict[str, Any] = {
        "session_id": f"{transcript.id}/{transcript.epoch}",
        "task": log.task,
        "system": log.system,
        "status": status,
        **{f"score_{name}": value for name, value in transcript.scores.items()},
        **{f"reason_{name}": text for name, text in transcript.reasons.items()},
        **{name: value for name, value in transcript.facts.items() if name != "calls"},
    }
    if transcript.target:
        metadata["target"] = transcript.target
    if transcript.failure:
        metadata["failure"] = transcript.failure
    return trackio.Trace([_make_message(message) for message in transcript.messages], metadata)


def _make_message(message: Message) -> Message:
    """Return a message as OpenAI's API has it."""
    made: Message = {"role": str(message.get("role") or "user"), "content": str(message.get("content") or "")}
    made |= {name: message[name] for name in ("tool_call_id", "name") if message.get(name)}
    calls = read_calls(message)
    if calls:
        made["tool_calls"] = [
            {
                "id": call["id"] or f"call-{number}",
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])},
            }
            for number, call in enumerate(calls)
        ]
    return made
