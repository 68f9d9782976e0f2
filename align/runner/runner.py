"""Runs a pipeline: one process per stage, finished stages skipped, killed ones resumed. Never imports torch."""

from __future__ import annotations

import contextlib
import signal
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.validation import suggest
from align.errors import NO_SPACE, StageFailed, UserError, no_space
from align.evaluation.scorecard import Scorecard
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import StopRequest
from align.runner.listener import Listener
from align.runner.prepare import Prepared, RunOptions, prepare_run
from align.runner.results import COLUMNS, FRAME_TYPES, data_frame, logged_rows, result_rows
from align.runner.run_stage import StageRun
from align.runner.stage_process import forked_stages
from align.runner.sync import upload
from align.store.artifacts import Artifact, Kind
from align.store.store import Store

if TYPE_CHECKING:
    from pandas import DataFrame


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
        """Return a stage's artifact; for a stage of a loop, that of its last round.

        Raises ``UserError`` for a name that the run does not have.
        """
        name = self.last.get(stage, stage)
        if name not in self.artifacts:
            known = [*self.artifacts, *self.last]
            raise UserError(f"run: there is no finished stage '{stage}'.{suggest(stage, known)}")
        return self.artifacts[name]

    def rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each number of the run, in the order of the stages.

        It has ``stage``, ``system`` (of an evaluation, else None), ``metric``, ``value``, and for systems the 95 %
        interval ``low`` to ``high`` and the number of items ``n``. Raises ``UserError`` for a damaged scorecard.
        """
        return result_rows(self.artifacts.values())

    def frame(self) -> DataFrame:
        """Return the rows of ``rows()`` as a table of pandas. Raises ``UserError`` where pandas is missing."""
        return data_frame(self.rows(), COLUMNS, "run.rows()").astype(FRAME_TYPES)

    def log_history(self, stage: str) -> list[dict[str, Any]]:
        """Return what a stage logged: a dictionary for each step, with ``step`` and the numbers of that step."""
        return logged_rows(self.artifact(stage))

    def curves(self, stage: str) -> DataFrame:
        """Return what a stage logged as a table of pandas: the index is ``step``, a column per metric.

        A metric that was not logged at a step is missing there. Raises ``UserError`` where pandas is missing.
        """
        rows = self.log_history(stage)
        names = dict.fromkeys(name for row in rows for name in row)
        return data_frame(rows, {"step": None, **names}, f"run.log_history({stage!r})").set_index("step")

    def scorecard(self, stage: str | None = None) -> Scorecard:
        """Return the scorecard of an evaluation, by default of the run's last one.

        Raises ``UserError`` for a stage that makes none, and for a scorecard that is damaged or of another version.
        """
        evaluations = [name for name, artifact in self.artifacts.items() if artifact.kind == Kind.SCORECARD]
        if stage is None and not evaluations:
            raise UserError("run: no stage of it evaluates; add one of the kind `evaluate`.")
        artifact = self.artifact(evaluations[-1] if stage is None else stage)
        if artifact.kind != Kind.SCORECARD:
            known = f" Evaluations here: {', '.join(evaluations)}." if evaluations else ""
            raise UserError(f"run: stage '{stage}' makes a {artifact.kind}, not a scorecard.{known}")
        return Scorecard.read(artifact.path, artifact.stage)

    def failed_gates(self) -> list[str]:
        """Return one text for each gate that an evaluation of this run failed; empty where all passed."""
        return [
            str(text)
            for artifact in self.artifacts.values()
            for text in artifact.record["metrics"].get("failed_gates") or []
        ]


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

    Raises ``UserError`` (nothing started), ``StageFailed`` (the log's path is in it), or
    ``Stopped`` once it was asked to stop: through ``stop``, or by the signal USR1 where none is given.
    """
    listener = listener or Listener()
    ready = prepare_run(pipeline, RunOptions(store, only, from_, rebuild, strict), listener)
    for message in ready.warnings:
        listener.warning(message)
    _refuse_nodes_without_a_place(pipeline, ready.wanted)
    # A caller with its own request, such as a job of Slurm, handles the signals itself.
    requests = contextlib.nullcontext(stop) if stop is not None else StopRequest().handle_signals(signal.SIGUSR1)
    try:
        with (
            requests as stop,
            # While stages run, ``gc`` on any machine leaves this run's artifacts alone, those to come included.
            ready.store.use(pipeline.name, pipeline.references, pipeline.plain),
            _forked_stages(pipeline, ready.wanted),
        ):
            return _run_stages(pipeline, ready, only, listener, stop)
    except OSError as error:  # the runner's own writing: locks, records, the move of a result to its place
        if error.errno not in NO_SPACE:
            raise
        raise StageFailed(no_space(ready.store.root)) from None


def _run_stages(pipeline: Pipeline, ready: Prepared, only: str | None, listener: Listener, stop: StopRequest) -> Run:
    opened, force = ready.store, ready.force
    run = Run(opened, last={name: pipeline.resolve(name) for name in pipeline.expanded.rounds})
    # A damaged artifact is an error only where the run would use it.
    used = pipeline.touched_by(only) - force
    only = None if only is None else pipeline.resolve(only)
    for node in pipeline:
        look = opened.find if node.name in used else opened.find_intact
        artifact = look(node.stage.kind, node.key, node.name)
        if artifact is not None and node.name not in force:
            run.artifacts[node.name] = artifact
            listener.stage_cached(node, artifact)
            opened.drop_leftovers(node.stage.kind, node.key)
            # An earlier run may have finished the stage while the remote was away.
            upload(opened, artifact, listener.transfer)
        elif only is None or node.name == only:
            # Without ``only`` this loop has found or made the inputs. With it they were checked, and may be gone since.
            gone = [name for name in node.input_names if name not in run.artifacts]
            if gone:
                raise UserError(f"--only {only}: it reads {', '.join(gone)}, deleted just now. Run without --only.")
            inputs = {name: run.artifacts[name] for name in node.input_names}
            if stop.is_requested:
                raise stop.error(f"stopped as asked, before stage '{node.name}'.")
            stage_run = StageRun(pipeline, node, opened, inputs, node.name in force, listener, stop)
            has_run, run.artifacts[node.name] = stage_run.run()
            if has_run:
                run.ran.append(node.name)
    return run


def _forked_stages(pipeline: Pipeline, nodes: list[Node]) -> AbstractContextManager[None]:
    """Return the context in which stages that load models are forked, where one follows the first of ``nodes``."""
    # The server's imports take as long as a stage's own. They gain nothing for the first stage, and all of it for one
    # that follows: they are done beside the first.
    runtimes = [pipeline.runtimes[node.name] for node in nodes[1:] if node.stage.estimator is not None]
    if not runtimes:
        return contextlib.nullcontext()
    vllm = any(node.stage.samples and pipeline.runtimes[node.name].may_open_vllm for node in nodes)
    return forked_stages(runtimes[-1].threads, vllm=vllm)


def _refuse_nodes_without_a_place(pipeline: Pipeline, nodes: list[Node]) -> None:
    """A stage on several nodes must know where they meet before it starts."""
    for node in nodes:
        objection = pipeline.runtimes[node.name].launch.nowhere_to_meet() if node.stage.distributed else None
        if objection is not None:
            raise UserError(f"{pipeline.where}: runtime.launch, for stage '{node.name}': {objection}")
