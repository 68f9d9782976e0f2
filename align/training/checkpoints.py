"""Which checkpoint a killed stage may resume from.

transformers writes a checkpoint file by file, so a kill can leave one that looks whole and is not. A checkpoint
counts only when our marker, written last, lists every file with its size. Leaves out keeping the newest two: the
trainer's ``save_total_limit`` does that.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MARKER = "complete.json"


def mark_complete(folder: Path) -> None:
    """Bring every file of ``folder`` to the disk, then write the marker in one rename."""
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER):
        _sync(file)
        sizes[str(file.relative_to(folder))] = file.stat().st_size
    draft = folder / f"{MARKER}.draft"
    draft.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    _sync(draft)
    draft.rename(folder / MARKER)
    _sync(folder)


def is_complete(folder: Path) -> bool:
    """Whether the marker is there and every file it lists has its size."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_complete(checkpoints: Path) -> Path | None:
    """The newest complete ``checkpoint-<step>`` folder, or None; incomplete ones are deleted."""
    found: list[tuple[int, Path]] = []
    for folder in checkpoints.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and is_complete(folder):
            found.append((int(step), folder))
        else:
            shutil.rmtree(folder)
    return max(found)[1] if found else None


class MarkCheckpoints(TrainerCallback):
    """Marks each checkpoint once the trainer has written all of it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
