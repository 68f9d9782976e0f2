"""The loop of ``RLTrainer``: what callbacks see, what its checkpoints hold, and which options it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerCallback

from align.errors import UserError
from align.rl.refusals import UNSUPPORTED


class Events(TrainerCallback):
    """Records the names of the Trainer's events in their order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattribute__(self, name: str):
        if name.startswith("on_"):
            return lambda *args, **kwargs: self.names.append(name.removeprefix("on_"))
        return super().__getattribute__(name)


class StopAfter(TrainerCallback):
    """Asks to stop in the middle of an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def test_callbacks_get_the_events_of_transformers(make_trainer) -> None:
    events = Events()
    # Eight responses: two mini-batches of two micro-batches each.
    make_trainer(updates=1, num_mini_batches=2, per_device_train_batch_size=2, callbacks=[events]).train()
    step = ["step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end"]
    assert events.names == [
        "init_end",
        "train_begin",
        "epoch_begin",
        *step,
        *step,
        "log",  # the update
        "epoch_end",
        "log",  # the run
        "train_end",
    ]


def test_stop_in_mid_update_ends_with_the_update(make_trainer) -> None:
    trainer = make_trainer(updates=3, num_mini_batches=2, callbacks=[StopAfter(step=1)])
    trainer.train()
    assert (trainer.update, trainer.state.global_step) == (1, 2)


def test_checkpoint_has_the_files_of_transformers(make_trainer, tmp_path: Path) -> None:
    make_trainer(updates=1, save_strategy="steps", output_dir=str(tmp_path)).train()
    files = {file.name for file in (tmp_path / "checkpoint-1").iterdir()}
    assert files >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


@pytest.mark.parametrize("option", ["auto_find_batch_size", "neftune_noise_alpha", "push_to_hub", "use_liger_kernel"])
def test_option_without_effect_is_refused(make_trainer, option: str) -> None:
    with pytest.raises(UserError, match=f"does not support {option}: {UNSUPPORTED[option][:12]}"):
        make_trainer(**{option: True})
