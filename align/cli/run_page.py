"""The page about a run, from whatever of it the store holds: finished stages, the one that failed, those that wait.

``<store>/reports/<run>/report.html`` with its figures and tables beside it. What the page says is ``align.report``'s.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from align.config.base import input_fields
from align.config.validation import suggest
from align.errors import UserError
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.registry import find_stage
from align.runner.stage_result import left_result
from align.store.artifacts import Artifact, Kind
from align.store.atomic_write import write_text_atomically
from align.store.fingerprint import digest, file_digest
from align.store.locks import Lock
from align.store.partial import LOG
from align.store.record import DamagedRecord
from align.store.store import REPORTS, Store
from align.store.version import VERSION

PAGE, STAMP = "report.html", ".written"
STOPPED = "stopped before it was done; the same command continues."
RUNNING = "being made right now; this page shows how far it was."


@dataclass(frozen=True)
class RunOf:
    """A run by name: its stages in order with kind and key, and the pipeline it came from, as parsed YAML."""

    name: str
    stages: Mapping[str, tuple[str, str]]
    pipeline: Mapping[str, Any]

    def inputs(self, stage: str) -> list[str]:
        """Names of the stages that one reads, in so far as its kind can be found here."""
        block = (self.pipeline.get("stages") or {}).get(stage)
        block = block if isinstance(block, dict) else {}
        try:
            fields = input_fields(find_stage(str(block.get("stage", stage))).config_class())
        except (KeyError, UserError):
            return []
        values = [block.get(name) for name in fields]
        flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
        return [str(item) for item in dict.fromkeys(map(str, filter(None, flat))) if item in self.stages]

    @property
    def title(self) -> str:
        """The heading that the pipeline's own report stage has, else the run's name."""
        blocks = self.pipeline.get("stages")
        for name, block in blocks.items() if isinstance(blocks, dict) else ():
            if isinstance(block, dict) and block.get("stage", name) == "report" and block.get("title"):
                return str(block["title"])
        return self.name


@dataclass(frozen=True)
class Failure:
    """The stage that did not finish, why, and its log where there is one."""

    stage: str
    message: str
    log: Path | None = None
    status: Literal["failed", "stopped", "running"] = "failed"


def run_of(pipeline: Pipeline) -> RunOf:
    """The run that ``pipeline`` is, finished or not."""
    return RunOf(pipeline.name, {node.name: (node.stage.kind, node.key) for node in pipeline}, pipeline.plain)


def find_run(word: str, store: Store) -> RunOf:
    """The run that ``word`` means: a pipeline file, or a name that the store remembers; ``UserError`` for neither."""
    if Path(word).is_file() or word.endswith((".yaml", ".yml")):
        return run_of(Pipeline.load(word))
    runs, damaged = store.survey_runs()
    if word not in runs:
        for error in damaged:
            if error.name == word:
                raise error
        known = suggest(word, runs) or " No run has been made there yet."
        raise UserError(f"{word}: neither a pipeline file nor a run of the store {store.root}.{known}")
    return remembered(word, runs[word])


def remembered(name: str, found: Mapping[str, Any]) -> RunOf:
    """A run as the store's file about it has it."""
    stages = {stage: (entry["kind"], entry["key"]) for stage, entry in found.get("stages", {}).items()}
    return RunOf(name, stages, found.get("pipeline") or {})


def finished(run: RunOf, store: Store) -> dict[str, Artifact]:
    """Artifacts of the run's finished stages, in its order; reports and damaged ones (``damages``) are left out."""
    found = {name: store.find_intact(kind, key, name) for name, (kind, key) in run.stages.items()}
    return {
        name: artifact
        for name, artifact in found.items()
        if artifact is not None and artifact.kind != Kind.REPORT and not store.problems(artifact, thorough=False)
    }


def damages(run: RunOf, store: Store) -> dict[str, str]:
    """Stages whose artifacts are damaged, each with the file, the finding and the remedy."""
    texts = {}
    for name, (kind, key) in run.stages.items():
        try:
            artifact = store.find(kind, key, name)
        except DamagedRecord as error:
            texts[name] = str(error)
            continue
        for problem in store.problems(artifact, thorough=False) if artifact is not None else []:
            texts[name] = f"{problem.path} {problem.what}. `--rebuild {name}` makes it again."
            break
    return texts


def unfinished(run: RunOf, store: Store) -> Failure | None:
    """The first stage that is damaged, or was begun and is not finished, and what its process left about it."""
    damaged = damages(run, store)
    for name, (kind, key) in run.stages.items():
        if name in damaged:
            return Failure(name, damaged[name])
        partial = store.partial(kind, key)
        if store.find_intact(kind, key) is not None or not partial.is_dir():
            continue
        log = partial / LOG if (partial / LOG).is_file() else None
        if store.is_locked(kind, key):
            return Failure(name, RUNNING, log, "running")
        result = left_result(partial)
        if result is None or result.status == "done":
            return Failure(name, STOPPED, log, "stopped")
        return Failure(name, result.message, log)
    return None


def write_page(
    run: RunOf,
    store: Store,
    failure: Failure | None = None,
    folder: Path | None = None,
    *,
    cached: Collection[str] = (),
    always: bool = True,
) -> Path:
    """Write the page into ``folder``, by default the store's own place for it, and return its path.

    ``cached`` names stages that a run found finished. Unless ``always``, a page that was written of the same is left as
    it is. Raises ``UserError`` where there is nothing to show.
    """
    from align.report.page import write_report

    artifacts = finished(run, store)
    if failure is not None:
        artifacts.pop(failure.stage, None)  # it is being made anew: what it was before says nothing of this run
    if not artifacts and failure is None:
        raise UserError(f"{run.name}: no stage is finished yet, so there is nothing to show; `align run` makes them.")
    folder = folder or store.root / REPORTS / run.name
    folder.mkdir(parents=True, exist_ok=True)
    stamp = _stamp(run, artifacts, failure)
    with _alone(folder, store):
        if not always and (folder / PAGE).is_file() and _read(folder / STAMP) == _sealed(stamp, folder):
            return folder / PAGE
        (folder / STAMP).unlink(missing_ok=True)
        pending = {
            name: run.inputs(name)
            for name, (kind, _) in run.stages.items()
            if name not in artifacts and kind != "report" and (failure is None or name != failure.stage)
        }
        failed = None if failure is None else _failed(run, store, failure, list(pending))
        page = write_report(
            list(artifacts.values()),
            None,
            folder / PAGE,
            failed=failed,
            title=run.title,
            cached=cached,
            pending=pending,
        )
        write_text_atomically(folder / STAMP, _sealed(stamp, folder))
    return page


@contextlib.contextmanager
def _alone(folder: Path, store: Store) -> Iterator[None]:
    """Nobody else, on whatever machine, writes the page meanwhile."""
    hold = Lock(folder / ".locks", store.lease).acquire(lambda _: None, store.patience)
    try:
        yield
    finally:
        store.patience.keep_trying(hold.release)


def _failed(run: RunOf, store: Store, failure: Failure, pending: list[str]) -> dict[str, Any]:
    """What ``write_report`` is told of a stage that did not finish."""
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


def _stamp(run: RunOf, artifacts: Mapping[str, Artifact], failure: Failure | None) -> str:
    """Changes with whatever the page is made of."""
    made = {name: [one.record["key"], str(one.record.get("created"))] for name, one in artifacts.items()}
    # a failed attempt's log and curves grow under the same name: never the same
    of_failure = None if failure is None else [failure.stage, failure.message, _age(failure)]
    return digest([VERSION, _code(), run.title, list(run.stages), list(made.items()), of_failure])


def _sealed(stamp: str, folder: Path) -> str:
    """The stamp with the digest of the page and of what lies beside it, so that a damaged one is written anew."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0][0] != "."]
    return digest([stamp, {path.relative_to(folder).as_posix(): file_digest(path) for path in files}])


def _age(failure: Failure) -> str:
    try:
        return "" if failure.log is None else str(failure.log.stat().st_mtime_ns)
    except OSError:
        return ""


@cache
def _code() -> str:
    """Digest of the code and the templates that make the page."""
    folder = Path(__file__).parents[1] / "report"
    return digest({file.name: file_digest(file) for file in sorted(folder.rglob("*.*")) if file.suffix != ".pyc"})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def try_page(run: RunOf, store: Store, failure: Failure | None, cached: Collection[str] = ()) -> Path | None:
    """The page after a run; an error in making it is said on standard error and changes nothing else."""
    try:
        return write_page(run, store, failure, cached=cached, always=False)
    except Exception as error:  # whatever it is: the run's own outcome must reach the user
        from align.cli.console import printable

        print(printable(f"note: the report could not be written: {type(error).__name__}: {error}"), file=sys.stderr)
        return None


def first_missing(pipeline: Pipeline, store: Store) -> Node | None:
    """The first stage without an artifact: where a run must have stopped that ended outside of a stage."""
    return next((node for node in pipeline if store.find_intact(node.stage.kind, node.key) is None), None)
