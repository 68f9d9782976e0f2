"""What a job reads of its submission when it starts before the submission is complete."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from align.clusters.slurm_submission import StageJob, Submission
from align.errors import UserError
from align.pipeline.pipeline import Pipeline
from align.store.store import Store
from tests.support import toy


def begin(folder: Path) -> Submission:
    return Submission.begin(Store(folder), Pipeline(toy.pipeline()), "toy")


def test_a_job_that_starts_at_once_waits_until_it_is_listed(tmp_path: Path) -> None:
    submission = begin(tmp_path)

    def list_job() -> None:
        submission.stages.append(StageJob("one", "number", "key", 7))
        submission.write()

    timer = threading.Timer(0.3, list_job)
    timer.start()
    assert Submission.read_for(submission.folder, "one").job_of("one").job == 7
    timer.join()


def test_a_job_that_is_never_listed_says_what_to_do(tmp_path: Path) -> None:
    submission = begin(tmp_path)
    with pytest.raises(UserError, match=r"does not list the job of stage 'one'.*Run the command again\."):
        Submission.read_for(submission.folder, "one", seconds=0)
