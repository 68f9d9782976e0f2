"""Runs that are killed, and their outcomes."""

from __future__ import annotations

from transformers import TrainerCallback

TIMED = ("seconds", "per_second", "peak_memory", "runtime")
FIELDS = {
    "updates": 4,
    "num_epochs": 2,
    "num_mini_batches": 2,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_updates": 1,
    "kl_controller": "adaptive",
    "kl_target": 0.1,
    "kl_horizon": 100,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.01,
    "whiten_rewards": True,
    "normalize_scores": True,
}


class Killed(BaseException):
    """As abrupt as a signal: nothing below catches it."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class StopOnceLearned(TrainerCallback):
    """Ends a run once three updates in a row have metrics above their bounds: what the test waits for has come."""

    def __init__(self, **bounds):
        self.bounds = bounds

    def on_log(self, args, state, control, **kwargs):
        last = [entry for entry in state.log_history if "score" in entry][-3:]
        if len(last) == 3 and all(entry[name] > bound for entry in last for name, bound in self.bounds.items()):
            control.should_training_stop = True


def outcome(trainer):
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    logs = [
        {k: v for k, v in entry.items() if not any(word in k for word in TIMED)}
        for entry in trainer.state.log_history
        if "score" in entry
    ]
    return weights, logs


SETTINGS = {
    "rollout_batch": 64,
    "samples_per_prompt": 8,
    "per_device_train_batch_size": 32,
    "num_epochs": 2,
    "num_mini_batches": 2,
    "max_tokens": 8,
    "learning_rate": 5e-3,
    "temperature": 0.5,
    "rollouts": {"keep": 0.0},
}


def history(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "score" in entry]
