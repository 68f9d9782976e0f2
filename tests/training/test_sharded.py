"""Which checkpoints are gathered from all processes; whole runs are in tests/training/test_distributed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.training import sharded
from align.training.sharded import ShardingTrainer


class Transformers:
    """The base class whose checkpoints hold one process's part."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        (Path(output_dir) / "part").touch()


class Trainer(ShardingTrainer, Transformers):
    model = None


@pytest.mark.parametrize(
    ("is_sharded", "has_deepspeed", "expected"),
    [(False, False, "part"), (True, False, "full"), (False, True, "full")],
    ids=["whole", "fsdp2", "deepspeed"],
)
def test_optimizer_in_parts_is_gathered_to_be_saved(
    is_sharded: bool, has_deepspeed: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_full(trainer: Any, folder: Path) -> None:
        (folder / "full").touch()

    monkeypatch.setattr(sharded, "is_sharded", lambda model: is_sharded)
    monkeypatch.setattr(sharded, "save_optimizer", save_full)
    trainer = Trainer()
    trainer.is_deepspeed_enabled = has_deepspeed
    trainer._save_optimizer_and_scheduler(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [expected]
