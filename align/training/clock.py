"""How long the training took that a result holds, over all attempts at it."""

from __future__ import annotations

import time
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "training_seconds.txt"
"""In a checkpoint's folder: the seconds of training up to it."""


class TrainingClock(TrainerCallback):
    """Seconds of training, kept with each checkpoint, so that a resumed run goes on counting from there.

    Steps that a kill threw away are made again and count once: tokens over these seconds are the speed of training.
    What a stage took in all, lost work included, is the record's ``seconds``.
    """

    def __init__(self, resumed: Path | None) -> None:
        """Starts to count; ``resumed`` is the checkpoint that training goes on from."""
        file = None if resumed is None else resumed / FILE
        self.knows_all = file is None or file.is_file()
        """False where the checkpoint says nothing of the time before it, which then counts as none."""
        self.before = float(file.read_text(encoding="utf-8")) if file is not None and self.knows_all else 0.0
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds so far."""
        return self.before + time.perf_counter() - self.start

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            (folder / FILE).write_text(f"{self.seconds():.3f}", encoding="utf-8")
