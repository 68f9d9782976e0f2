"""Names that scripts import: ``from align import Pipeline, Run, Scorecard``."""

from __future__ import annotations

from typing import Any

from align.clusters.ray import run_tasks
from align.clusters.slurm_submit import follow_jobs, submit_run
from align.errors import UserError
from align.evaluation.scorecard import Scorecard
from align.pipeline import pipeline
from align.runner.listener import Listener
from align.runner.notebook_listener import progress_listener
from align.runner.runner import Run, RunOptions, prepare_run, run_pipeline


class Pipeline(pipeline.Pipeline):
    """A pipeline that a script can run. It is checked when made and never changes: ``set`` returns a new pipeline."""

    def run(self, *, listener: Listener | None = None, progress: bool = False, **options: Any) -> Run:
        """Run the stages that are not cached, where ``runtime.executor`` says, and wait for them.

        ``progress`` shows the stages: in a notebook in one display that is updated in place, else as ``align run``
        does. A ``listener`` is told of them instead. ``options`` are those of ``RunOptions``, and for a local run also
        ``stop`` of ``run_pipeline``. Raises ``UserError``, ``StageFailed`` and ``Stopped`` as ``run_pipeline`` does.
        """
        if not progress:
            return self._run(listener or Listener(), options)
        if listener is not None:
            raise UserError("run: `progress=True` brings a listener of its own; leave `listener` or `progress` out.")
        with progress_listener(list(self)) as display:
            return self._run(display, options)

    def _run(self, listener: Listener, options: dict[str, Any]) -> Run:
        executor = self.config.runtime.executor.name
        if executor == "local":
            return run_pipeline(self, listener=listener, **options)
        if executor == "slurm":
            submitted = submit_run(self, RunOptions(**options))
            _warn(listener, submitted.warnings)
            return follow_jobs(submitted, listener)
        ready = prepare_run(self, RunOptions(**options), listener)
        _warn(listener, ready.warnings)
        return run_tasks(self, ready, listener)


def _warn(listener: Listener, warnings: list[str]) -> None:
    for message in warnings:
        listener.warning(message)


__all__ = ["Pipeline", "Run", "Scorecard"]
