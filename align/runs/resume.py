"""Start a stored run again in a separate process, as ``align run`` would continue it. Has no heavy imports."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.yaml import dump_yaml
from align.errors import StageFailed, UserError
from align.pipeline.file import settle_pipeline
from align.pipeline.pipeline import Pipeline
from align.runner.open_store import Opening
from align.runs.run_page import RunOutline
from align.store.json_files import read_tail, write_text_atomically
from align.store.store import Store

FOLDER = "resumed"
"""Folder of the store's cache with the pipeline and the console of each run that was resumed here."""
SECONDS_TO_START = 30.0
"""Time in which a run reaches its first stage or ends with an error; afterwards it is left to itself."""
CONSOLE_BYTES = 4000


@dataclass(frozen=True)
class Resumed:
    """A run that was started again: its process, and the file with its output."""

    process: int
    console: Path

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"process": self.process, "console": str(self.console)}


def console_path(store: Store, run: str) -> Path:
    """Return the file with the output of a run that was resumed."""
    return store.cache / FOLDER / f"{run}.log"


def resume_run(run: RunOutline, store: Store, seconds: float = SECONDS_TO_START) -> Resumed:
    """Start ``align run`` with the stored pipeline, detached from this process.

    Relative paths of the pipeline start at the folder in which the run was started.

    Raises:
        UserError: if a stage runs already, if nothing is left to do, or if the pipeline has other keys than the run,
            because files that it reads have changed or start at another folder.
        StageFailed: if the process ends with an error before its first stage.
    """
    store.require_writable()
    if any(store.is_locked(kind, key) for kind, key in run.stages.values()):
        raise UserError(f"{run.name}: a stage of it runs already; stop it first, or wait for it.")
    if all(store.find_intact(kind, key) is not None for kind, key in run.stages.values()):
        raise UserError(f"{run.name}: every stage is finished, so there is nothing to resume.")
    console = console_path(store, run.name)
    console.parent.mkdir(parents=True, exist_ok=True)
    file = console.with_suffix(".yaml")
    write_text_atomically(file, dump_yaml(_complete_paths(run)))
    _check_keys(run, file)
    process = _start(file, Opening.of(store), console)
    _wait_for_stage(process, run, store, console, seconds)
    return Resumed(process.pid, console)


def _complete_paths(run: RunOutline) -> dict[str, Any]:
    """Return the stored pipeline with absolute paths: its file lies in another folder than the first one."""
    return settle_pipeline(run.located(), Path("/"), run.name)


def _check_keys(run: RunOutline, file: Path) -> None:
    """Raise ``UserError`` if the stages of the file have other keys than the run: they would begin anew."""
    pipeline = Pipeline.load(file)
    keys = {node.name: (node.stage.kind, node.key) for node in pipeline}
    changed = [name for name, link in run.stages.items() if keys.get(name) != link]
    if changed:
        raise UserError(
            f"{run.name}: the stage '{changed[0]}' has another key now, so it would not be resumed. Its files or its "
            f"code have changed, or its paths start at another folder than {run.folder or Path.cwd()}. Continue it "
            "with `align run` and its pipeline file."
        )


def _start(file: Path, opening: Opening, console: Path) -> subprocess.Popen[bytes]:
    """Start the command in a new session: neither Ctrl-C nor the end of this process ends it."""
    environment = dict(os.environ)
    if opening.remote is not None:
        environment["ALIGN_STORE"] = opening.remote
    command = [sys.executable, "-m", "align.cli.main", "run", str(file.resolve()), "--store", opening.folder]
    with console.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    # Its end is collected, so that it does not stay as a zombie.
    threading.Thread(target=process.wait, name=f"resumed-{process.pid}", daemon=True).start()
    return process


def _wait_for_stage(
    process: subprocess.Popen[bytes], run: RunOutline, store: Store, console: Path, seconds: float
) -> None:
    """Wait until a stage is locked; raise ``StageFailed`` if the process ends with an error before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if any(store.is_locked(kind, key) for kind, key in run.stages.values()):
            return
        time.sleep(0.1)
    if process.returncode:
        output = read_tail(console, CONSOLE_BYTES).decode("utf-8", "replace").strip()
        raise StageFailed(f"{run.name}: align run ended with exit code {process.returncode}: {output}\nLog: {console}")
