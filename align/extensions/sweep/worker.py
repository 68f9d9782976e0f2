"""Run a sweep's trials: each is a run of the pipeline with a draw's changes; unchanged stages come from the store.

A trial that fails is recorded, and the next one begins. A stage that is the same in all trials ends the sweep when it
fails, since it would fail in each. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from align.config.validation import suggest
from align.errors import StageFailed, UserError
from align.extensions.sweep.plan import Sweep, UndefinedObjective
from align.extensions.sweep.study import Study, Trial, TrialLost
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner.listener import Listener
from align.runner.runner import Run, run_pipeline
from align.store.artifacts import EVENTS, Artifact
from align.store.json_files import read_events
from align.store.record import DamagedArtifact
from align.store.store import Store

ListenerFactory = Callable[[Pipeline], AbstractContextManager[Listener]]
"""Returns a context with the listener of a trial's run."""
TEST = "test_"
VALIDATION = "validation_"
"""Prefixes of curves on held-out rows: of the ``test`` split, and of rows held back from ``train``."""


class TrialPruned(Exception):
    """The trial's curve is behind the other trials'."""


def curve_name(node: Node, name: str) -> str:
    """Return the name that a curve of held-out rows has in the events of a stage.

    A stage that chooses its checkpoint by validation rows scores those while it trains, not the ``test`` split.
    """
    by_metric = getattr(node.config, "best_metric", None) is not None
    if name.startswith(TEST) and getattr(node.config, "chooses", False) and not by_metric:
        return VALIDATION + name.removeprefix(TEST)
    return name


class _TrialListener:
    """Passes events on to a ``Listener``, remembers the stage that failed, and ends a trial whose curve is behind."""

    def __init__(self, inner: Listener, sweep: Sweep, study: Study, trial: Trial, pipeline: Pipeline) -> None:
        self.inner = inner
        self.study = study
        self.trial = trial
        self.failure: tuple[Node, str, Path] | None = None
        self.current: Node | None = None
        prune = sweep.config.prune
        stage, _, self.curve = ("" if prune is None else prune.target).partition(".")
        self.stage = pipeline.resolve(stage)
        # The pruner compares in the objective's direction; the sign turns a curve of the other direction around.
        maximizes_curve = prune is not None and prune.maximize is not None
        self.sign = 1.0 if maximizes_curve == sweep.objectives[0].higher else -1.0
        self.curves: set[str] = set()
        """Names of the curves that the stage has drawn so far."""

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        """Record the curve of a finished stage: later trials are compared with it."""
        if node.name == self.stage:
            # The pruner's answer is ignored, since the work of this stage is done already.
            for event in read_events(artifact.path / EVENTS):
                self._record_point(node, event)
            self._check_curve(node)
        self.inner.stage_cached(node, artifact)

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        """Record the points that an earlier attempt of the stage has drawn."""
        self.current = node
        if node.name == self.stage and resumed:
            for event in read_events(folder / EVENTS):
                self._record_point(node, event)
        self.inner.stage_started(node, folder, resumed)

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        """Record a point; raises ``TrialPruned`` if the trial is behind."""
        self.inner.stage_event(node, event)
        if node.name == self.stage and self._record_point(node, event):
            raise TrialPruned

    def stage_done(self, node: Node, artifact: Artifact) -> None:
        """Check that the curve exists; a misspelled curve would never prune."""
        if node.name == self.stage:
            self._check_curve(node)
        self.inner.stage_done(node, artifact)

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        """Remember the failure."""
        self.failure = (node, message, log)
        self.inner.stage_failed(node, message, log)

    def __getattr__(self, name: str) -> Any:
        """Return what the inner listener does with an event that this listener does not look at."""
        return getattr(self.inner, name)

    def _record_point(self, node: Node, event: dict[str, Any]) -> bool:
        """Record one point of the curve; return True when the trial should end there."""
        if event.get("event") != "metrics":
            return False
        self.curves |= {name for name in event if name not in ("event", "time", "step")}
        value = event.get(curve_name(node, self.curve))
        if not isinstance(value, (int, float)):
            return False
        return self.study.should_prune(self.trial, int(event["step"]), self.sign * float(value))

    def _check_curve(self, node: Node) -> None:
        """Raise ``UserError`` if the stage has drawn no such curve."""
        if curve_name(node, self.curve) not in self.curves:
            raise UserError(
                f"prune: stage '{node.name}' has no curve '{self.curve}'.{suggest(self.curve, self.curves)}"
            )


@dataclass(frozen=True)
class Worker:
    """One process that runs trials."""

    sweep: Sweep
    study: Study
    store: Store
    open_listener: ListenerFactory
    log: Callable[[Trial, str], None]
    """Called when a trial ``starts`` or ``resumes``, and when it ends: ``done``, ``failed``, ``ended early``, or
    ``taken over`` by another worker."""
    stop: StopRequest | None = None

    def run(self) -> None:
        """Run trials until none is left.

        Raises ``UserError`` and ``StageFailed`` for what would happen in every trial, and ``Stopped`` once ``stop`` is
        asked for; the trial then stays unfinished, and the next worker continues it.
        """
        # ``next`` returns None only when no other worker's trial can be left behind.
        while (trial := self.study.next()) is not None:
            self.log(trial, "resumes" if trial.resumed else "starts")
            try:
                if self.stop is not None and self.stop.is_requested:
                    raise Stopped("stopped as asked, between two trials.")
                outcome = self._run_trial(trial)
            except TrialLost:
                outcome = "taken over"
            finally:
                self.study.release(trial)
            self.log(trial, outcome)

    def _run_trial(self, trial: Trial) -> str:
        """Run one trial and record its outcome, which is returned."""
        sweep = self.sweep
        study = self.study
        try:
            # Bounds were checked one at a time; a combination of values may still be refused.
            pipeline = sweep.pipeline_of(trial.draw, trial.number)
        except UserError as error:
            study.fail(trial, error=str(error))
            return "failed"
        # A retry runs the failed stage again on purpose.
        known_failure = None if trial.is_retry else self._find_known_failure(pipeline)
        if known_failure is not None:
            study.fail(trial, error=known_failure)
            return "failed"
        with self.open_listener(pipeline) as inner:
            # Events of the run decide, while it runs, whether the trial continues.
            listener = _TrialListener(inner, sweep, study, trial, pipeline)
            try:
                run = run_pipeline(pipeline, store=self.store, listener=cast(Listener, listener), stop=self.stop)
            except TrialPruned:
                # The listener raised it while the runner followed the stage, and that has ended the stage's process.
                assert listener.current is not None
                node = listener.current
                # No worker will continue this stage, so its checkpoints only waste space.
                self.store.delete(self.store.partial(node.stage.kind, node.key))
                study.prune(trial, error=f"behind the others in {listener.curve}", run=pipeline.name)
                return "ended early"
            except DamagedArtifact as error:
                if error.stage in sweep.shared:  # it would happen in every trial
                    raise
                study.fail(trial, error=str(error), run=pipeline.name)
                return "failed"
            except (UserError, StageFailed) as error:
                self._record_failure(trial, pipeline, listener, error)
                return "failed"
        return self._finish(trial, run, pipeline)

    def _find_known_failure(self, pipeline: Pipeline) -> str | None:
        """Return the error of a stage that failed in an earlier trial with the same key, and is still missing."""
        failed = {
            str(record.notes.get("failed_key")): record.number
            for record in self.study.trials()
            if record.state == "failed"
        }
        for node in pipeline:
            number = failed.get(node.key)
            if number is not None and self.store.find_intact(node.stage.kind, node.key) is None:
                return f"stage '{node.name}' failed in trial {number} with the same settings"
        return None

    def _record_failure(
        self, trial: Trial, pipeline: Pipeline, listener: _TrialListener, error: UserError | StageFailed
    ) -> None:
        """Record that a stage failed. Raises what would happen in every trial."""
        if listener.failure is None:  # the store, the disk, the sweep itself
            raise error
        node, message, log = listener.failure
        if self.sweep.shared.get(node.name) == node.key:
            raise type(error)(f"{error}\nEvery trial has this stage, so the sweep ends here.") from None
        self.study.fail(trial, error=f"{node.name}: {message}", failed_key=node.key, log=str(log), run=pipeline.name)

    def _finish(self, trial: Trial, run: Run, pipeline: Pipeline) -> str:
        """Record the objectives' values in a finished run."""
        seconds = sum(float(run.artifacts[name].record.get("seconds") or 0) for name in run.ran)
        notes: dict[str, Any] = {
            "run": pipeline.name,
            "seconds": round(seconds, 1),
            "ran": run.ran,
            "gates": run.failed_gates(),
        }
        try:
            measured = [objective.read(run, pipeline) for objective in self.sweep.objectives]
        except UndefinedObjective as error:
            # Without a value only this trial fails. A wrong setting would fail in all trials, so it ends the sweep.
            self.study.fail(trial, error=str(error), **notes)
            return "failed"
        except UserError as error:
            raise UserError(f"{self.sweep.where}: {error}") from None
        notes["intervals"] = [[measurement.low, measurement.high] for measurement in measured]
        self.study.complete(trial, [measurement.value for measurement in measured], **notes)
        return "done"
