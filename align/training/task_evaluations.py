"""Evaluations on tasks during training: when they run, what they cost, and their state in checkpoints.

An evaluation changes no training result: the random states are restored, and the model returns to its mode. With
several processes the first one evaluates, and the others wait.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.data.rows import Message
from align.evaluation.training_tasks import LiveModel, TrainingTasks
from align.inference.protocol import Watchdog
from align.inference.transformers import LiveEngine
from align.models.chat.render import render_answered
from align.models.checkpoints.conversion import plain_of
from align.models.compute.processes import broadcast
from align.pipeline.context import StageContext
from align.store.json_files import write_text_atomically
from align.training import held_out

Scores = dict[str, float]
STATE = "evaluations.json"
"""File of a checkpoint with the state of ``TaskEvaluations``."""


class TaskEvaluations:
    """The evaluations of a stage: scores by step, skipped steps, and the share of the stage's time."""

    def __init__(self, context: StageContext, tokenizer: Any) -> None:
        self.context = context
        self.tasks = TrainingTasks(context, tokenizer)
        self.settings = self.tasks.settings
        self.scores: dict[int, Scores] = {}
        self.skipped: list[int] = []
        self.seconds = 0.0
        """Seconds of all evaluations."""
        self._last = 0.0
        """Seconds of the last evaluation, which the next one is expected to need."""
        self._before = time.time() - context.started
        """Seconds of this attempt until now, or of earlier attempts up to their last checkpoint."""
        self._started = time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Return True if the model after ``step`` steps, or updates, is to be evaluated."""
        return step % self.settings.every == 0 and step not in self.scores

    def run(self, step: int, measure: Callable[[], Scores], *, is_required: bool = False) -> Scores | None:
        """Evaluate with ``measure`` and log the metrics; None if the evaluation was done before, or costs too much.

        ``is_required``: evaluate at any cost. Every process calls this.
        """
        scores: Scores | None = broadcast(lambda: self._run(step, measure, is_required))
        if scores is not None:
            self.scores[step] = scores
        return scores

    def _run(self, step: int, measure: Callable[[], Scores], is_required: bool) -> Scores | None:
        if step in self.scores:
            return None
        if not is_required and self._is_too_expensive():
            self.skipped = sorted({*self.skipped, step})
            return None
        # A required evaluation may repeat a step that was skipped before.
        self.skipped = [skipped for skipped in self.skipped if skipped != step]
        started = time.perf_counter()
        self.context.phase("evaluating tasks")
        # Sampling for a task must not change the random numbers that training draws next.
        with unchanged_randomness():
            scores = measure()
        self._last = time.perf_counter() - started
        self.seconds += self._last
        self.context.log(step, **scores, evaluation_share=self.share)
        return scores

    @property
    def share(self) -> float:
        """Share of the stage's time, evaluations included."""
        return self.seconds / max(self._total, 1e-9)

    @property
    def _total(self) -> float:
        return self._before + time.perf_counter() - self._started

    def _is_too_expensive(self) -> bool:
        limit = self.settings.time_limit
        # The cost is unknown before the first evaluation, which therefore always runs.
        return limit is not None and (self.seconds + self._last) / (self._total + self._last) > limit

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps. JSON-able."""
        return {
            "scores": [[step, scores] for step, scores in self.scores.items()],
            "skipped": self.skipped,
            "seconds": self.seconds,
            "last": self._last,
            "total": self._total,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self.scores = {int(step): scores for step, scores in state["scores"]}
        self.skipped = list(state["skipped"])
        self.seconds = state["seconds"]
        self._last = state["last"]
        self._before = state["total"]
        self._started = time.perf_counter()

    def finish(self) -> dict[str, Any]:
        """Note the cost, and return the metrics of the stage: first and last scores, cost and skipped evaluations."""
        name = self.context.name
        count = len(self.skipped)
        skipped = f"; {count} were skipped to stay below at_most {self.settings.time_limit}" if count else ""
        cost = f"{self.share:.1%} of the time ({self.seconds:.1f} s)"
        text = f"{name}: {len(self.scores)} evaluations took {cost}{skipped}"
        if count and self.settings.best_metric is not None:
            self.context.warn(f"{text}, so which weights are kept depended on the clock. Raise evaluate.every instead.")
        else:
            self.context.note(text)
        metrics: dict[str, Any] = {
            "evaluations": len(self.scores),
            "evaluations_skipped": count,
            "evaluation_seconds": self.seconds,
            "evaluation_share": self.share,
        }
        for suffix, step in (("first", min(self.scores, default=None)), ("last", max(self.scores, default=None))):
            scores = {} if step is None else self.scores[step]
            metrics |= {f"{metric}_{suffix}": value for metric, value in scores.items()}
        return metrics


class EvaluateTasks(TrainerCallback):
    """Evaluates a trl trainer's model on the tasks. It comes before the callback that keeps the best weights."""

    def __init__(
        self, context: StageContext, trainer: Any, weights: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """``weights()`` is a context in which the model has the weights that would be the stage's result."""
        self.trainer = trainer
        self.weights = weights
        self.evaluations = TaskEvaluations(context, trainer.processing_class)
        self.on_scores: Callable[[Scores, int], None] | None = None
        """Gets the scores of every evaluation but the first, with the step."""

    def evaluate(self, step: int, *, is_required: bool = False) -> None:
        """Evaluate the model after ``step`` steps, unless it was evaluated or costs too much."""
        with self.weights():
            scores = self.evaluations.run(step, self._measure, is_required=is_required)
        if scores is not None and step and self.on_scores is not None:
            self.on_scores(scores, step)

    def _measure(self) -> Scores:
        with held_out.scoring(self.trainer):
            return self.evaluations.tasks.measure(live_model(self.evaluations.tasks, self.trainer))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Load the state of the checkpoint that training resumes from."""
        file = self.evaluations.context.checkpoints / f"checkpoint-{state.global_step}" / STATE
        # A stage that this stage continues may have had no tasks.
        if state.global_step and file.is_file():
            self.evaluations.load_state_dict(json.loads(file.read_text(encoding="utf-8")))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.evaluations.is_due(state.global_step):
            self.evaluate(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_text_atomically(folder / STATE, json.dumps(self.evaluations.state_dict()))

    def facts(self) -> dict[str, Any]:
        """Return the stage's metrics."""
        return self.evaluations.finish()


def live_model(tasks: TrainingTasks, trainer: Any) -> LiveModel:
    """Return a trl trainer's model as the tasks use it."""
    context = tasks.context
    tokenizer = tasks.system.policy.tokenizer
    model = plain_of(trainer.model)
    if not context.config.has_vocabulary:

        def score(prompts: Sequence[list[Message]], answers: Sequence[str], endings: Sequence[bool]) -> list[float]:
            rows = []
            for prompt, answer, is_finished in zip(prompts, answers, endings, strict=True):
                message = {"role": "assistant", "content": answer}
                row = {"prompt": prompt, "completion": [message], "completion_finished": is_finished}
                rows.append(render_answered(tokenizer, row, "completion"))
            return held_out.scores(trainer.model, rows, int(tokenizer.pad_token_id))

        return LiveModel(score=score)
    engine = None
    if tasks.samples:
        config = context.runtime.engine
        engine = LiveEngine(
            model,
            tokenizer,
            batch_size=config.batch_size,
            watchdog=Watchdog(LiveEngine.name, config.timeout, context.fail_at_once),
        )
    return LiveModel(model, engine)


@contextlib.contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        # By default torch warns if a machine has several GPUs. A process uses one.
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
