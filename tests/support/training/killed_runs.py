"""Stages that were killed beside the same stage that ran through, for tests of resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from align.pipeline.context import StageContext
from align.store.rollouts import ROLLOUTS, open_rollouts
from tests.support.training.kills import Kill, Killed, armed, assert_same, run, run_killed

Check = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class KilledRun:
    """A stage that ran through, its metrics, and the folder of one that was killed after a checkpoint."""

    uninterrupted: StageContext
    expected: dict[str, Any]
    killed: Path
    make: Callable[[Path], StageContext]

    def copy_to(self, folder: Path) -> StageContext:
        """Copy the killed stage to ``folder``, to be damaged."""
        shutil.copytree(self.killed, folder, symlinks=True)
        return self.make(folder)


def make_killed_run(make: Callable[[Path], StageContext], root: Path, step: int) -> KilledRun:
    """Run the stage that ``make`` lays out in a folder twice below ``root``: through, and killed after ``step``."""
    uninterrupted, killed = make(root / "whole"), make(root / "killed")
    expected = run(uninterrupted)
    with armed(Kill("after", step)), pytest.raises(Killed):
        run(killed)
    return KilledRun(uninterrupted, expected, root / "killed", make)


def make_check(
    make_stage: Callable[..., StageContext],
    model: Path,
    folders: pytest.TempPathFactory,
    same_rollouts: bool = False,
) -> Check:
    """Return ``check(kind, kills, **fields)``: a stage killed at each of them ends as the one that ran through.

    That one runs once for the same fields; its metrics are returned. ``same_rollouts`` also compares
    the stored rollouts, row by row.
    """
    runs: dict[str, tuple[StageContext, dict[str, Any]]] = {}

    def check(kind: str, sequence: list[Kill], **fields: Any) -> dict[str, Any]:
        name = f"{kind} {sorted(fields.items())}"
        if name not in runs:
            uninterrupted = make_stage(kind, folders.mktemp("whole"), model, **fields)
            runs[name] = uninterrupted, run(uninterrupted)
        uninterrupted, expected = runs[name]
        stage = make_stage(kind, folders.mktemp("killed"), model, **fields)
        assert_same(uninterrupted, stage, expected, run_killed(stage, sequence))
        if same_rollouts:
            expected_table, table = (
                open_rollouts(each.output / ROLLOUTS).to_table() for each in (uninterrupted, stage)
            )
            assert len(table) and table.equals(expected_table)
        return expected

    return check
