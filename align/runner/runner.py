"""Run a pipeline here, and read its results. Never imports torch."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.user_functions import module_folders
from align.config.validation import suggest
from align.errors import NO_SPACE, StageFailed, UserError, no_space, with_article
from align.evaluation.scorecard import Scorecard
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import StopRequest
from align.report.page.metric_series import metric_values
from align.runner.listener import Listener
from align.runner.open_store import fetch_missing, open_store, settle_states, upload
from align.runner.plan import History, choose_stages, refuse_without_state, stages_to_make
from align.runner.plan_warnings import check_sources
from align.runner.run_stage import StageRun
from align.runner.stage_process import forked_stages
from align.store.artifacts import Artifact, Kind
from align.store.json_files import read_events
from align.store.record import DamagedArtifact
from align.store.store import Store

if TYPE_CHECKING:
    from pandas import DataFrame
    from pyarrow.dataset import Dataset


@dataclass
class Run:
    """Result of a run: artifacts by stage name, and the stages that really ran."""

    store: Store
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    last: dict[str, str] = field(default_factory=dict)
    """Stage of a loop → its last round's."""

    def metrics(self, stage: str) -> dict[str, Any]:
        """The metrics in a stage's record; for a stage of a loop, of its last round."""
        metrics: dict[str, Any] = self.artifact(stage).record["metrics"]
        return metrics

    def artifact(self, stage: str) -> Artifact:
        """Return a stage's artifact; for a stage of a loop, the last round's.

        Raises ``UserError`` for a name that the run does not have.
        """
        name = self.last.get(stage, stage)
        if name not in self.artifacts:
            names = [*self.artifacts, *self.last]
            raise UserError(f"run: there is no finished stage '{stage}'.{suggest(stage, names)}")
        return self.artifacts[name]

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each number of the run, in the order of the stages.

        It has ``stage``, ``system`` (of an evaluation, else None), ``metric``, ``value``, and for systems the 95 %
        interval ``low`` to ``high`` and the number of items ``n``. Raises ``UserError`` for a damaged scorecard.
        """
        return result_rows(self.artifacts.values())

    def frame(self) -> DataFrame:
        """Return the rows of ``rows()`` as a table of pandas. Raises ``UserError`` if pandas is missing."""
        return data_frame(self.rows(), COLUMNS, "run.rows()").astype(FRAME_TYPES)

    def log_history(self, stage: str) -> list[dict[str, Any]]:
        """Return what a stage logged: a dictionary for each step, with ``step`` and the numbers of that step."""
        return logged_rows(self.artifact(stage))

    def curves(self, stage: str) -> DataFrame:
        """Return what a stage logged as a table of pandas: the index is ``step``, a column per metric.

        A metric that was not logged at a step is missing there. Raises ``UserError`` if pandas is missing.
        """
        rows = self.log_history(stage)
        names = dict.fromkeys(name for row in rows for name in row)
        return data_frame(rows, {"step": None, **names}, f"run.log_history({stage!r})").set_index("step")

    def rollouts(self, stage: str | None = None, *, validations: bool = False) -> Dataset:
        """Return the responses that a stage sampled as a dataset of pyarrow, which reads nothing yet.

        Args:
            stage: Name of a stage that samples, by default the run's last stage with stored rollouts; for a stage of a
                loop, its last round is read.
            validations: Return the responses to the held-out prompts instead.

        Raises:
            UserError: for a stage without stored rollouts.
        """
        from align.store import rollouts

        name = rollouts.VALIDATIONS if validations else rollouts.ROLLOUTS
        artifacts = list(reversed(self.artifacts.values())) if stage is None else [self.artifact(stage)]
        for artifact in artifacts:
            if rollouts.rollout_files(artifact.path / name):
                return rollouts.open_rollouts(artifact.path / name)
        missing = f"no stage has {name}" if stage is None else f"stage '{stage}' has no {name}"
        setting = "eval_updates" if validations else "rollouts.keep"
        raise UserError(
            f"run: {missing}. Stages that sample store them with {setting}; run such a stage again with --rebuild."
        )

    def scorecard(self, stage: str | None = None) -> Scorecard:
        """Return the scorecard of an evaluation, by default of the run's last evaluation.

        Raises ``UserError`` for a stage that makes none, and for a scorecard that is damaged or of another version.
        """
        evaluations = [name for name, artifact in self.artifacts.items() if artifact.kind == Kind.SCORECARD]
        if stage is None and not evaluations:
            raise UserError("run: no stage of it evaluates; add one of the kind `evaluate`.")
        artifact = self.artifact(evaluations[-1] if stage is None else stage)
        if artifact.kind != Kind.SCORECARD:
            hint = f" Evaluations here: {', '.join(evaluations)}." if evaluations else ""
            raise UserError(f"run: stage '{stage}' makes {with_article(artifact.kind)}, not a scorecard.{hint}")
        return Scorecard.read(artifact.path, artifact.stage)

    def failed_gates(self) -> list[str]:
        """Return one text for each gate that an evaluation of this run failed; empty if all passed."""
        gates: list[str] = []
        for artifact in self.artifacts.values():
            gates += artifact.record["metrics"].get("failed_gates") or []
        return gates


def run_pipeline(
    pipeline: Pipeline,
    *,
    store: str | Path | Store | None = None,
    only: str | None = None,
    from_: str | None = None,
    rebuild: tuple[str, ...] = (),
    strict: bool = False,
    listener: Listener | None = None,
    stop: StopRequest | None = None,
) -> Run:
    """Run every stage that is not cached, in order; ``store`` to ``strict`` are as of ``RunOptions``.

    Raises ``UserError`` (no stage started), ``StageFailed`` (the log's path is in it), or
    ``Stopped`` once it was asked to stop: through ``stop``, or by the signal USR1 if none is given.
    """
    listener = listener or Listener()
    pipeline = settle_states(pipeline, store)
    ready = prepare_run(pipeline, RunOptions(store, only, from_, rebuild, strict), listener)
    for message in ready.warnings:
        listener.warning(message)
    _refuse_nodes_without_a_place(pipeline, ready.wanted)
    # A caller with its own request, such as a job of Slurm, handles the signals itself.
    requests = contextlib.nullcontext(stop) if stop is not None else StopRequest().handle_signals(signal.SIGUSR1)
    try:
        with (
            requests as stop,
            # While stages run, ``gc`` on any machine keeps this run's artifacts, future artifacts included.
            ready.store.use(pipeline.name, pipeline.references, pipeline.plain, module_folders()),
            _forked_stages(pipeline, ready.wanted),
        ):
            return _run_stages(pipeline, ready, only, listener, stop)
    except OSError as error:  # the runner's own writing: locks, records, the move of a result to its place
        if error.errno not in NO_SPACE:
            raise
        raise StageFailed(no_space(ready.store.root)) from None


def _run_stages(pipeline: Pipeline, ready: Prepared, only: str | None, listener: Listener, stop: StopRequest) -> Run:
    store = ready.store
    force = ready.force
    run = Run(store, last={name: pipeline.resolve(name) for name in pipeline.expanded.rounds})
    # A damaged artifact is an error only if the run would use it.
    used = pipeline.touched_by(only) - force
    only = None if only is None else pipeline.resolve(only)
    for node in pipeline:
        find = store.find if node.name in used else store.find_intact
        artifact = find(node.stage.kind, node.key, node.name)
        if artifact is not None and node.name not in force:
            run.artifacts[node.name] = artifact
            listener.stage_cached(node, artifact)
            store.drop_leftovers(node.stage.kind, node.key)
            # An earlier run may have finished the stage while the remote was away.
            upload(store, artifact, listener.transfer)
        elif only is None or node.name == only:
            # Without ``only`` this loop has found or made the inputs. With it they were checked, and may be gone since.
            gone = [name for name in node.input_names if name not in run.artifacts]
            if gone:
                raise UserError(f"--only {only}: it reads {', '.join(gone)}, deleted just now. Run without --only.")
            inputs = {name: run.artifacts[name] for name in node.input_names}
            if stop.is_requested:
                raise stop.error(f"stopped as asked, before stage '{node.name}'.")
            stage_run = StageRun(pipeline, node, store, inputs, node.name in force, listener, stop)
            has_run, run.artifacts[node.name] = stage_run.run()
            if has_run:
                run.ran.append(node.name)
    return run


def _forked_stages(pipeline: Pipeline, nodes: list[Node]) -> AbstractContextManager[None]:
    """Return the context in which stages that load models are forked, if one follows the first of ``nodes``."""
    # The server's imports last as long as a stage's own. They save no time in the first stage, and all of it in later
    # stages, because they run during the first stage.
    runtimes = [pipeline.runtimes[node.name] for node in nodes[1:] if node.stage.estimator is not None]
    if not runtimes:
        return contextlib.nullcontext()
    vllm = any(node.stage.samples and pipeline.runtimes[node.name].may_open_vllm for node in nodes)
    return forked_stages(runtimes[-1].threads, vllm=vllm)


def _refuse_nodes_without_a_place(pipeline: Pipeline, nodes: list[Node]) -> None:
    """Raise ``UserError`` for a stage on several nodes that does not know their rendezvous."""
    for node in nodes:
        objection = pipeline.runtimes[node.name].launch.nowhere_to_meet() if node.stage.distributed else None
        if objection is not None:
            raise UserError(f"{pipeline.where}: runtime.launch, for stage '{node.name}': {objection}")


@dataclass(frozen=True)
class RunOptions:
    """Choice of a pipeline's stages and of the store; the same for a run here and one on a cluster."""

    store: str | Path | Store | None = None
    """As of ``open_store``."""
    only: str | None = None
    """Make this one stage, whose inputs must be finished."""
    from_: str | None = None
    """Run this stage and all that depend on it, although they are finished."""
    rebuild: tuple[str, ...] | str = ()
    """Run these stages although they are finished."""
    strict: bool = False
    """Refuse artifacts made by other source code under the same stage version."""


@dataclass(frozen=True)
class Prepared:
    """A run that may begin."""

    store: Store
    force: set[str]
    """Stages that are made although an artifact is there."""
    wanted: list[Node]
    """Stages that are to be made, in order."""
    warnings: list[str]


def prepare_run(pipeline: Pipeline, options: RunOptions, listener: Listener | None = None) -> Prepared:
    """Open the store, fetch what is finished in its remote, and choose what is made.

    Raises ``UserError`` for what must stop a run before it starts.
    """
    listener = listener or Listener()
    require_trackers(pipeline.config.runtime.report_to)  # before there is a store
    store = open_store(pipeline, options.store)
    store.require_writable()
    store.retry.log = listener.warning
    from_ = options.from_
    # A script may name a single stage as a text, which is no tuple of letters.
    rebuild = (options.rebuild,) if isinstance(options.rebuild, str) else options.rebuild
    # Twice: what is rebuilt need not be fetched, but ``--only`` checks its inputs, which may have to be fetched first.
    rebuilt = choose_stages(pipeline, store, None, from_, rebuild)
    fetch_missing(pipeline, store, options.only, rebuilt, listener.transfer)
    force = choose_stages(pipeline, store, options.only, from_, rebuild)
    # All that can stop the run is checked before its first stage, not hours later when a stage reads it.
    used = pipeline.touched_by(options.only) - force
    _refuse_damage(pipeline, store, used)
    warnings = check_sources(pipeline, store, used, options.strict)
    nodes = stages_to_make(pipeline, store, options.only, force)
    refuse_without_state(pipeline, store, nodes, force)
    # Forced stages get no suggestion: the user asked for all of their steps.
    history = History(pipeline, store)
    suggestions = [history.suggest(node) for node in nodes if node.name not in force]
    return Prepared(store, force, nodes, [*warnings, *(text for text in suggestions if text)])


def _refuse_damage(pipeline: Pipeline, store: Store, used: set[str]) -> None:
    """Raise ``DamagedArtifact``, which names all damaged finished stages that the run would use."""
    damaged: dict[str, str] = {}
    for node in pipeline:
        if node.name not in used:
            continue
        try:
            artifact = store.find(node.stage.kind, node.key, node.name)
        except DamagedArtifact as error:
            damaged[node.name] = str(error)
            continue
        problems = store.problems(artifact, thorough=False) if artifact is not None else []
        if problems:
            damaged[node.name] = (
                f"stage '{node.name}': {problems[0].path} {problems[0].description}. "
                f"The artifact is corrupted; `--rebuild {node.name}` makes it again."
            )
    if damaged:
        raise DamagedArtifact("\n".join(damaged.values()), next(iter(damaged)))


def is_installed(package: str) -> bool:
    """Return whether ``package`` can be imported; a plain folder of that name, as wandb creates, does not count."""
    spec = importlib.util.find_spec(package)
    # A folder of that name in the current directory is also found, as a namespace without an origin.
    return spec is not None and spec.origin is not None


def require_trackers(names: Iterable[str]) -> None:
    """Raise ``UserError`` for the trackers among ``names`` whose package, called as the tracker is, is missing."""
    missing = [name for name in names if not is_installed(name)]
    if missing:
        verb, pronoun = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise UserError(
            f"runtime.report_to: {', '.join(missing)} {verb} not installed. "
            f"`pip install {' '.join(missing)}`, or leave {pronoun} out."
        )


COLUMNS = ("stage", "system", "metric", "value", "low", "high", "n")
FRAME_TYPES = {"value": "float64", "low": "float64", "high": "float64", "n": "Int64"}
"""Types of the columns of numbers in a table, also where all are missing; ``Int64`` has missing whole numbers."""
RECORD_FIELDS = ("seconds", "peak_memory_bytes")
"""Numbers of every stage's record, in addition to its metrics."""
SCORECARD_SUMMARIES = ("values", "differences")
"""Parts of an evaluation's record that repeat its scorecard without intervals."""

Row = dict[str, Any]


def result_rows(artifacts: Iterable[Artifact]) -> list[Row]:
    """Return a row with ``COLUMNS`` for each number of the stages, in their order.

    Raises ``UserError`` for an evaluation whose scorecard cannot be read.
    """
    rows: list[Row] = []
    for artifact in artifacts:
        for metric, value in record_numbers(artifact.record).items():
            rows.append({**dict.fromkeys(COLUMNS), "stage": artifact.stage, "metric": metric, "value": value})
        if artifact.kind == Kind.SCORECARD:
            card = Scorecard.read(artifact.path, artifact.stage)
            rows += [{"stage": artifact.stage, **row} for row in card.rows()]
    return rows


def record_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a stage's record by name; numbers of an inner block begin with its name and a dot."""
    metrics = {name: value for name, value in (record.get("metrics") or {}).items() if name not in SCORECARD_SUMMARIES}
    numbers = dict(_flatten(metrics))
    # Times that a stage measures itself leave out the start of its process; the record's count.
    return numbers | dict(_flatten({name: record.get(name) for name in RECORD_FIELDS}))


def _flatten(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in block.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def logged_rows(artifact: Artifact) -> list[Row]:
    """Return what a stage logged: a row for each step, with ``step`` and the finite numbers of that step."""
    by_step: dict[float, Row] = {}
    for event in read_events(artifact.path / "events.jsonl"):
        if event["event"] == "metrics":
            # A resumed stage logs steps again from its checkpoint; the later value replaces the lost one.
            row = by_step.setdefault(event["step"], {"step": event["step"]})
            row.update(metric_values(event))
    return [by_step[step] for step in sorted(by_step)]


def data_frame(rows: list[Row], columns: Iterable[str] | None, instead: str) -> DataFrame:
    """Return rows as a table of pandas; all ``columns`` are there even without rows.

    Raises ``UserError`` if pandas is missing; ``instead`` is the call that needs no pandas.
    """
    try:
        from pandas import DataFrame
    except ImportError:
        raise UserError(
            f"pandas is not installed, and a DataFrame needs it: `pip install pandas`. "
            f"{instead} returns the same as a list of dictionaries."
        ) from None
    return DataFrame.from_records(rows, columns=None if columns is None else list(columns))
