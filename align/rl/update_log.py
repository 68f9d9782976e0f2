"""The metrics of an update: collected while it samples, measures and learns, logged when it is over."""

from __future__ import annotations

import time
from typing import Any

import torch

from align.rl import metrics
from align.rl.alarms import CONSTANT_SCORE, MARKER, new_alarms
from align.rl.rollout import Rollout
from align.rl.rollout_tables import example


class UpdateLog:
    """Collects the metrics of the current update; ``write`` logs them through the Trainer and raises alarms."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.total_loss = 0.0
        """Sum of the losses of all optimizer steps since the run was started or resumed."""
        self._metrics: dict[str, float] = {}
        self._example = ""
        """A response of the update with its score, for an alarm."""
        self._loss = torch.tensor(0.0, device=trainer.args.device)
        self._gradient_norm = torch.tensor(0.0)
        self._learning_rate = 0.0
        self.markers = metrics.Markers()
        self._steps = 0
        """Optimizer steps of the update that were made."""
        self._learning_started = 0.0

    def begin(self, rollout: Rollout, kl_coef: float) -> None:
        """Note the metrics that are known before learning, and write down the rollout."""
        trainer = self.trainer
        args = self.trainer.args
        statistics = metrics.rollout_statistics(trainer.objective.averages, rollout, args.drift.max_staleness > 0)
        self._metrics = (
            statistics | {"kl_coef": kl_coef} | trainer.sampler.cache_statistics | trainer.probe.pop_metrics()
        )
        self._metrics |= self.markers.observe(rollout.candidates or rollout)
        self._example = example(rollout.candidates or rollout)
        if trainer.is_world_process_zero():
            trainer.recorder.write(rollout)
        self._steps = 0
        self._learning_started = time.perf_counter()

    def report_micro_batch(self, number: int, count: int) -> None:
        """Report which micro-batch of the update is learned from, by its number among the ``count`` of its step."""
        total = self.trainer.args.config.steps_per_update * count
        self.trainer.report_phase(f"learning {self._steps * count + number}/{total}")

    def add_step(self, loss: torch.Tensor, gradient_norm: torch.Tensor, learning_rate: float) -> None:
        """Note the loss and the gradient norm, both scalars, and the learning rate of an optimizer step."""
        self._steps += 1
        self._loss += loss
        self._gradient_norm = gradient_norm
        self._learning_rate = learning_rate

    def write(self) -> None:
        """Log the metrics of the update, and raise the alarms that are new in it."""
        trainer = self.trainer
        args = self.trainer.args
        # Each process's loss is multiplied by the number of processes, as DDP averages gradients.
        loss = float(trainer.reduce(self._loss)) / args.world_size
        self._loss -= self._loss
        self.total_loss += loss
        logs = {
            "loss": loss / args.config.steps_per_update,
            "grad_norm": float(self._gradient_norm),
            "learning_rate": self._learning_rate,
            **metrics.finish(trainer.objective.averages.means(trainer.reduce)),
            **self._metrics,
            **trainer.totals,
            "update": trainer.update,
            "seconds_learning": time.perf_counter() - self._learning_started,
        }
        logs["seconds"] = sum(value for name, value in logs.items() if name.startswith("seconds_"))
        logs["peak_memory_gib"] = metrics.peak_memory_gib()
        trainer.log(logs)
        self._raise_alarms()

    def _raise_alarms(self) -> None:
        """Notify of alarms that no earlier update raised, and stop the run if ``on_alarm`` says so.

        An alarm that is raised again, after it had ended, is only noted. The end of the run counts them.
        """
        trainer = self.trainer
        history = [entry for entry in trainer.state.log_history if "score" in entry]
        for alarm in new_alarms(history):
            is_repeated = any(alarm.name == earlier.name for earlier in trainer.alarms)
            trainer.alarms.append(alarm)
            if is_repeated:
                continue
            text = f"update {alarm.update}: {alarm.name}: {alarm.text}."
            if alarm.name == CONSTANT_SCORE:
                reasons = metrics.score_reasons(trainer.config, history[-1])
                text = " ".join((text, *(f"{reason}." for reason in reasons), f"Example: {self._example}"))
            if alarm.name == MARKER:
                text = f"{text} Noticed: {self.markers.describe()}. Example: {self._example}"
            if trainer.is_world_process_zero():
                trainer.notify(text)
            if trainer.config.on_alarm == "stop":
                trainer.alarm_stop = trainer.alarm_stop or text
                trainer.stopped = trainer.alarm_stop
