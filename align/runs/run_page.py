"""Writes the page about a run from what the store holds of it: finished stages, a failed stage, waiting stages.

The page is ``<store>/reports/<run>/report.html``, with its figures and tables next to it. ``align.report`` renders it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from align.config.base import input_fields, names_in_block
from align.config.user_functions import add_module_folders
from align.config.user_paths import locate
from align.config.validation import suggest
from align.errors import UserError
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.registry import find_stage
from align.runner.open_store import open_store
from align.runner.stage_result import left_result
from align.store.artifacts import EVENTS, LOG, VERSION, Artifact, Kind
from align.store.fingerprint import digest, file_digest
from align.store.json_files import write_text_atomically
from align.store.locks import Lock
from align.store.record import DamagedRecord
from align.store.store import REPORTS, Store

PAGE = "report.html"
STAMP = ".written"
PAGE_FOLDERS = ("figures", "tables")
"""Folders of a page's files."""
STOPPED = "stopped before it was done; the same command continues."
RUNNING = "running now; this page shows its state when it was written."


@dataclass(frozen=True)
class RunOutline:
    """A run by name: its stages in order with kind and key, and its pipeline as parsed YAML."""

    name: str
    stages: Mapping[str, tuple[str, str]]
    pipeline: Mapping[str, Any]
    folder: str = ""
    """Folder in which it was started and relative paths start; empty for the current one."""
    modules: tuple[str, ...] = ()
    """Further folders with Python modules that the pipeline names."""

    def located(self) -> dict[str, Any]:
        """Return the pipeline with its paths marked with their folder, and have its modules found."""
        folder = Path(self.folder) if os.path.isdir(self.folder) else Path.cwd()
        add_module_folders([*([] if folder == Path.cwd() else [str(folder)]), *self.modules])
        return dict(locate(dict(self.pipeline), folder / f"{self.name}.yaml"))

    def inputs(self, stage: str) -> list[str]:
        """Return the names of the stages that ``stage`` reads; empty if its kind cannot be imported here."""
        block = (self.pipeline.get("stages") or {}).get(stage)
        block = block if isinstance(block, dict) else {}
        try:
            fields = input_fields(find_stage(str(block.get("stage", stage))).config_class())
        except (KeyError, UserError):
            return []
        names = [name for field in fields for name in names_in_block(block, field)]
        return [name for name in dict.fromkeys(names) if name in self.stages]

    @property
    def title(self) -> str:
        """The title in the pipeline's report stage, else the run's name."""
        blocks = self.pipeline.get("stages")
        if not isinstance(blocks, dict):
            return self.name
        for name, block in blocks.items():
            if isinstance(block, dict) and block.get("stage", name) == "report" and block.get("title"):
                return str(block["title"])
        return self.name


@dataclass(frozen=True)
class Failure:
    """A stage that did not finish, the reason, and its log if there is one."""

    stage: str
    message: str
    log: Path | None = None
    status: Literal["failed", "stopped", "running"] = "failed"


def outline_of(pipeline: Pipeline) -> RunOutline:
    """Return the outline of a pipeline's run, finished or not."""
    return RunOutline(pipeline.name, {node.name: (node.stage.kind, node.key) for node in pipeline}, pipeline.plain)


def names_file(word: str) -> bool:
    """Return True for a word that names a pipeline file, and False for the name of a run."""
    return Path(word).is_file() or word.endswith((".yaml", ".yml"))


def open_store_of(words: Iterable[str | None], place: str | None) -> Store:
    """Open the store at ``place``, else the store that the pipeline files among the words name (``runtime.store``).

    Raises ``UserError`` if they name different stores.
    """
    pipelines = {word: Pipeline.load(word) for word in words if word is not None and names_file(word)}
    if not pipelines:
        return open_store(None, place)
    first, *others = pipelines
    for word in others if place is None else ():
        if pipelines[word].config.runtime.store != pipelines[first].config.runtime.store:
            raise UserError(f"{first} and {word} name different stores (runtime.store); name the one with --store.")
    return open_store(pipelines[first], place)


def find_run(word: str, store: Store) -> RunOutline:
    """Return the run that ``word`` names: a pipeline file or a run of the store. Raise ``UserError`` for neither."""
    if names_file(word):
        return outline_of(Pipeline.load(word))
    runs, damaged = store.survey_runs()
    if word not in runs:
        for error in damaged:
            if error.name == word:
                raise error
        hint = suggest(word, runs) or " This store has no runs yet."
        raise UserError(f"{word}: neither a pipeline file nor a run of the store {store.root}.{hint}")
    return stored_outline(word, runs[word])


def stored_outline(name: str, entry: Mapping[str, Any]) -> RunOutline:
    """Return the outline of a run from the store's entry about it."""
    stages = {stage: (link["kind"], link["key"]) for stage, link in entry.get("stages", {}).items()}
    modules = tuple(entry.get("modules", ()))
    return RunOutline(name, stages, entry.get("pipeline") or {}, entry.get("folder", ""), modules)


def finished_artifacts(run: RunOutline, store: Store) -> dict[str, Artifact]:
    """Return the artifacts of the run's finished stages, in its order, without reports and damaged artifacts."""
    artifacts = {}
    for name, (kind, key) in run.stages.items():
        artifact = store.find_intact(kind, key, name)
        if artifact is None or artifact.kind == Kind.REPORT:
            continue
        if not store.problems(artifact, thorough=False):
            artifacts[name] = artifact
    return artifacts


def damaged_stages(run: RunOutline, store: Store) -> dict[str, str]:
    """Return the stages with damaged artifacts, each with the file, the problem and the remedy."""
    texts = {}
    for name, (kind, key) in run.stages.items():
        try:
            artifact = store.find(kind, key, name)
        except DamagedRecord as error:
            texts[name] = str(error)
            continue
        problems = list(store.problems(artifact, thorough=False)) if artifact is not None else []
        if problems:
            texts[name] = f"{problems[0].path} {problems[0].description}. `--rebuild {name}` runs the stage again."
    return texts


def find_failure(run: RunOutline, store: Store) -> Failure | None:
    """Return the first stage that is damaged or unfinished, with the message of its process; None if there is none."""
    return next(find_unfinished(run, store), None)


def find_unfinished(run: RunOutline, store: Store) -> Iterator[Failure]:
    """Yield the stages that are damaged or have begun and not finished, in the run's order."""
    damaged = damaged_stages(run, store)
    for name, (kind, key) in run.stages.items():
        if name in damaged:
            yield Failure(name, damaged[name])
            continue
        partial = store.partial(kind, key)
        # A stage without a partial folder has not begun.
        if store.find_intact(kind, key) is not None or not partial.is_dir():
            continue
        log = partial / LOG if (partial / LOG).is_file() else None
        # The lock is held as long as some process runs the stage, here or on another machine.
        if store.is_locked(kind, key):
            yield Failure(name, RUNNING, log, "running")
            continue
        result = left_result(partial)
        if result is None or result.status == "done":
            yield Failure(name, STOPPED, log, "stopped")
        else:
            yield Failure(name, result.message, log)


def page_folder(store: Store, name: str) -> Path:
    """Return the folder of a page: in the store, or below the current folder if the store is read-only."""
    return (store.root if store.is_writable else Path.cwd()) / REPORTS / name


def write_page(
    run: RunOutline,
    store: Store,
    failure: Failure | None = None,
    folder: Path | None = None,
    *,
    cached: Collection[str] = (),
    always: bool = True,
    refresh: int | None = None,
    finished: Collection[str] | None = None,
    states: Mapping[str, str] | None = None,
) -> Path:
    """Write the page into ``folder``, by default ``page_folder``, and return its path.

    ``cached`` names the stages that a run did not have to run. Unless ``always``, a page with the same content is not
    written again. ``refresh`` makes the page reload itself after so many seconds. ``finished`` names the stages whose
    artifacts count; by default all. ``states`` has stages besides the stage of ``failure`` that are ``running`` or
    ``failed``, as on a cluster; by default the store determines them. Raises ``UserError`` if the page would be empty.
    """
    artifacts = finished_artifacts(run, store)
    if finished is not None:
        artifacts = {name: artifact for name, artifact in artifacts.items() if name in finished}
    if failure is not None:
        artifacts.pop(failure.stage, None)  # a rerun: the earlier artifact is not a result of this run
    if not artifacts and failure is None:
        raise UserError(f"{run.name}: no stage is finished yet, so there is nothing to show; `align run` runs them.")
    folder = folder or page_folder(store, run.name)
    folder.mkdir(parents=True, exist_ok=True)
    states = _other_states(run, store, failure) if states is None else dict(states)
    stamp = _stamp(run, artifacts, failure, states, refresh)
    with _page_lock(folder, store):
        # Compare under the lock: another process may have written the same page meanwhile.
        if not always and (folder / PAGE).is_file() and _read(folder / STAMP) == _seal(stamp, folder):
            return folder / PAGE
        # Import it late, because a fully cached run writes no page.
        from align.report.run.run_report import write_report

        # A kill from here on leaves a page without a stamp, which the next run writes again.
        (folder / STAMP).unlink(missing_ok=True)
        pending = _pending_stages(run, artifacts, failure)
        others = [name for name in pending if name not in states]
        page = write_report(
            list(artifacts.values()),
            None,
            folder / PAGE,
            failed=None if failure is None else _describe_failure(run, store, failure, others),
            title=run.title,
            cached=cached,
            pending=pending,
            states=states,
            refresh=refresh,
        )
        write_text_atomically(folder / STAMP, _seal(stamp, folder))
    return page


def _other_states(run: RunOutline, store: Store, failure: Failure | None) -> dict[str, str]:
    """Return the stages other than ``failure``'s stage that run or have failed, as several do on a cluster."""
    if failure is None:
        return {}
    others = (stage for stage in find_unfinished(run, store) if stage.stage != failure.stage)
    return {other.stage: other.status for other in others if other.status != "stopped"}


def _pending_stages(run: RunOutline, done_stages: Collection[str], failure: Failure | None) -> dict[str, Any]:
    """Return the inputs of each stage that is neither done, a report, nor the failed stage."""
    ended_stages = set(done_stages)
    if failure is not None:
        ended_stages.add(failure.stage)
    stages = [name for name, (kind, _) in run.stages.items() if kind != "report"]
    return {name: run.inputs(name) for name in stages if name not in ended_stages}


@contextlib.contextmanager
def _page_lock(folder: Path, store: Store) -> Iterator[None]:
    """Hold the lock of the page, so no other process on any machine writes it meanwhile."""
    lock = Lock(folder / ".locks", store.lease).acquire(lambda _: None, store.retry)
    try:
        yield
    finally:
        store.retry.call(lock.release)


def _describe_failure(run: RunOutline, store: Store, failure: Failure, pending: list[str]) -> dict[str, Any]:
    """Return the ``failed`` argument of ``write_report``."""
    kind, key = run.stages[failure.stage]
    partial = store.partial(kind, key)
    return {
        "stage": failure.stage,
        "status": failure.status,
        "kind": kind,
        "message": failure.message,
        "log": None if failure.log is None else str(failure.log),
        "folder": str(partial) if partial.is_dir() else None,
        "inputs": run.inputs(failure.stage),
        "pending": pending,
    }


def _stamp(
    run: RunOutline,
    artifacts: Mapping[str, Artifact],
    failure: Failure | None,
    states: Mapping[str, str],
    refresh: int | None,
) -> str:
    """Return a digest of everything that the page shows: it changes when the page would."""
    identities = [
        (name, [artifact.record["key"], str(artifact.record.get("created"))]) for name, artifact in artifacts.items()
    ]
    # The log and curves of a failed attempt grow in the same file, so its time also counts.
    failure_identity = None if failure is None else [failure.stage, failure.message, _file_times(failure)]
    state_identities = [failure_identity, states, refresh]
    return digest([VERSION, _code_digest(), run.title, list(run.stages), identities, *state_identities])


def _seal(stamp: str, folder: Path) -> str:
    """Return a digest of the stamp and of the page's files, to detect a damaged page and write it again."""
    # No other files: a user's folder may hold a whole store.
    parts = [folder / PAGE, *(path for name in PAGE_FOLDERS for path in (folder / name).rglob("*"))]
    files = sorted(path for path in parts if path.is_file())
    return digest([stamp, {path.relative_to(folder).as_posix(): file_digest(path) for path in files}])


def _file_times(failure: Failure) -> list[int]:
    """Return when the log and the events of an unfinished stage were last written."""
    times = []
    for name in (LOG, EVENTS):
        with contextlib.suppress(OSError):
            times.append(0 if failure.log is None else (failure.log.parent / name).stat().st_mtime_ns)
    return times


@cache
def _code_digest() -> str:
    """Return a digest of the code and the templates that render the page."""
    folder = Path(__file__).parents[1] / "report"
    files = sorted(file for file in folder.rglob("*.*") if file.suffix != ".pyc")
    return digest({str(file.relative_to(folder)): file_digest(file) for file in files})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def try_write_page(run: RunOutline, store: Store, failure: Failure | None, cached: Collection[str] = ()) -> Path | None:
    """Write the page after a run and return its path; an error is only printed, on standard error."""
    try:
        return write_page(run, store, failure, cached=cached, always=False)
    except Exception as error:  # any error: the outcome of the run itself must reach the user
        from align.errors import printable

        print(printable(f"note: the report could not be written: {type(error).__name__}: {error}"), file=sys.stderr)
        return None


def first_missing(pipeline: Pipeline, store: Store) -> Node | None:
    """Return the first stage without an artifact: there a run stopped that ended outside of a stage."""
    return next((node for node in pipeline if store.find_intact(node.stage.kind, node.key) is None), None)
