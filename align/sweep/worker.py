"""Runs a sweep's trials: each is a run of the pipeline with a draw set, sharing unchanged stages through the store.

A trial that fails is noted and the next one begins; a stage that is the same in all trials ends the sweep when it
fails, since it would in each. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from align.config.validation import suggest
from align.errors import StageFailed, UserError
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner.listener import Listener
from align.runner.runner import Run, run_pipeline
from align.store.artifacts import Artifact
from align.store.events import read_events
from align.store.partial import EVENTS
from align.store.record import DamagedArtifact
from align.store.store import Store
from align.sweep.objectives import NoNumber
from align.sweep.plan import Sweep
from align.sweep.study import Study, Trial, TrialLost

Watching = Callable[[Pipeline], AbstractContextManager[Listener]]
"""Gives the listener of a trial's run."""


class Ended(Exception):
    """The trial's curve is behind those of the others."""


class _Watch(Listener):
    """Passes everything on, remembers what failed, and ends a trial whose curve is behind."""

    def __init__(self, inner: Listener, sweep: Sweep, study: Study, trial: Trial, pipeline: Pipeline) -> None:
        self.inner, self.study, self.trial = inner, study, trial
        self.failure: tuple[Node, str, Path] | None = None
        self.current: Node | None = None
        prune = sweep.config.prune
        given = "" if prune is None else str(prune.maximize or prune.minimize)
        self.stage, _, self.curve = given.partition(".")
        self.stage = pipeline.resolve(self.stage)
        higher = prune is not None and prune.maximize is not None
        self.sign = 1.0 if higher == sweep.objectives[0].higher else -1.0
        self.curves: set[str] = set()

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        if node.name == self.stage:
            for event in read_events(artifact.path / EVENTS):
                self._point(event)
            self._has_the_curve(node)
        self.inner.stage_cached(node, artifact)

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        self.current = node
        if node.name == self.stage and resumed:  # points that an earlier attempt made
            for event in read_events(folder / EVENTS):
                self._point(event)
        self.inner.stage_started(node, folder, resumed)

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        self.inner.stage_event(node, event)
        if node.name == self.stage and self._point(event):
            raise Ended

    def stage_done(self, node: Node, artifact: Artifact) -> None:
        if node.name == self.stage:
            self._has_the_curve(node)
        self.inner.stage_done(node, artifact)

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        self.failure = (node, message, log)
        self.inner.stage_failed(node, message, log)

    def waiting(self, node: Node, holder: str) -> None:
        self.inner.waiting(node, holder)

    def warning(self, message: str) -> None:
        self.inner.warning(message)

    def _point(self, event: dict[str, Any]) -> bool:
        """Report one point; whether the trial should end."""
        if event.get("event") != "metrics":
            return False
        self.curves |= {name for name in event if name not in ("event", "time", "step")}
        value = event.get(self.curve)
        if not isinstance(value, (int, float)):
            return False
        return self.study.behind(self.trial, int(event["step"]), self.sign * float(value))

    def _has_the_curve(self, node: Node) -> None:
        if self.curve not in self.curves:
            raise UserError(
                f"prune: stage '{node.name}' has no curve '{self.curve}'.{suggest(self.curve, self.curves)}"
            )


def work(
    sweep: Sweep,
    study: Study,
    store: Store,
    watching: Watching,
    told: Callable[[Trial, str], None],
    stop: StopRequest | None = None,
) -> None:
    """Run trials until there are none left to run.

    ``watching`` gives the listener of a trial's run; ``told`` hears of a trial's beginning (``starts`` or ``resumes``)
    and how it ended (``done``, ``failed``, ``ended early``, or ``taken over`` by another worker). Raises ``UserError``
    and ``StageFailed`` for what would happen in every trial, and ``Stopped`` once ``stop`` is asked for; the trial is
    then left open, and the next call goes on with it.
    """
    while (trial := study.next()) is not None:
        told(trial, "resumes" if trial.resumed else "starts")
        try:
            if stop is not None and stop.is_requested:
                raise Stopped("stopped as asked, between two trials.")
            how = _run_trial(sweep, study, store, watching, trial, stop)
        except TrialLost:
            how = "taken over"
        finally:
            study.release(trial)
        told(trial, how)


def _run_trial(
    sweep: Sweep, study: Study, store: Store, watching: Watching, trial: Trial, stop: StopRequest | None
) -> str:
    try:
        pipeline = sweep.pipeline_of(trial.draw, trial.number)
    except UserError as error:
        study.failed(trial, error=str(error))
        return "failed"
    known = {str(one.notes.get("failed_key")): one.number for one in study.tried() if one.state == "failed"}
    for node in pipeline:
        before = known.get(node.key)
        if before is None or _retried(study, trial) is not None:
            continue
        if store.find_intact(node.stage.kind, node.key) is None:
            study.failed(trial, error=f"stage '{node.name}' is the same as in trial {before}, where it failed")
            return "failed"
    with watching(pipeline) as inner:
        watch = _Watch(inner, sweep, study, trial, pipeline)
        try:
            run = run_pipeline(pipeline, store=store, listener=watch, stop=stop)
        except Ended:
            assert watch.current is not None
            node = watch.current
            store.delete(store.partial(node.stage.kind, node.key))  # its checkpoints are of no use to anyone
            study.ended(trial, error=f"behind the others in {sweep.config.prune and watch.curve}", run=pipeline.name)
            return "ended early"
        except DamagedArtifact as error:
            if error.stage in sweep.shared:  # it would be so in every trial
                raise
            study.failed(trial, error=str(error), run=pipeline.name)
            return "failed"
        except (UserError, StageFailed) as error:
            if watch.failure is None:  # the store, the disk, the sweep itself: it would be so in every trial
                raise
            node, message, log = watch.failure
            if sweep.shared.get(node.name) == node.key:
                raise type(error)(f"{error}\nThis stage is the same in every trial, so the sweep ends here.") from None
            study.failed(trial, error=f"{node.name}: {message}", failed_key=node.key, log=str(log), run=pipeline.name)
            return "failed"
    return _finish(sweep, study, trial, run, pipeline)


def _retried(study: Study, trial: Trial) -> int | None:
    found: int | None = trial.handle.user_attrs.get("retry_of")
    return found


def _finish(sweep: Sweep, study: Study, trial: Trial, run: Run, pipeline: Pipeline) -> str:
    notes: dict[str, Any] = {
        "run": pipeline.name,
        "seconds": round(sum(float(run.artifacts[name].record.get("seconds") or 0) for name in run.ran), 1),
        "ran": run.ran,
        "gates": run.failed_gates(),
    }
    try:
        readings = [one.read(run, pipeline) for one in sweep.objectives]
    except NoNumber as error:
        study.failed(trial, error=str(error), **notes)
        return "failed"
    except UserError as error:
        raise UserError(f"{sweep.where}: {error}") from None
    notes["intervals"] = [[one.low, one.high] for one in readings]
    study.done(trial, [one.value for one in readings], **notes)
    return "done"


__all__ = ["Ended", "Watching", "work"]
