"""Questions to Slurm about jobs, and how its answers are read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from align.clusters.slurm import commands

ANSWERS = {
    "squeue": "101|RUNNING|None|n1\n104|PENDING|Resources|\n",
    "sacct": "102|CANCELLED by 1000\n103_1|COMPLETED\n103_2|FAILED\n",
}


@pytest.fixture
def queue_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run."""
    calls: list[list[str]] = []

    def ask(command: Sequence[str], tries: int = 1) -> str:
        calls.append(list(command))
        return ANSWERS[command[0]]

    monkeypatch.setattr(commands, "run_command", ask)
    return calls


def test_jobs_that_the_queue_has_forgotten_are_asked_for_all_at_once(queue_calls: list[list[str]]) -> None:
    """One question for each made `align gc` slow in proportion to all jobs that there ever were."""
    states = {number: job.state for number, job in commands.jobs([101, 102, 103, 105]).items()}
    assert states == {101: "RUNNING", 102: "CANCELLED", 103: "COMPLETED"}
    assert [command[0] for command in queue_calls] == ["squeue", "sacct"]
    assert "--jobs=102,103,105" in queue_calls[1]
    assert commands.jobs([101]).keys() == {101} and len(queue_calls) == 3


def test_the_jobs_of_other_users_are_asked_for_where_they_count(queue_calls: list[list[str]]) -> None:
    commands.jobs([101])
    commands.jobs([101], all_users=True)
    assert ["--me" in command for command in queue_calls] == [True, False]
