"""What submitted jobs that wait or run will need, so that ``align gc`` leaves it alone. Never imports torch."""

from __future__ import annotations

from align.clusters.follow import NoAnswer
from align.clusters.slurm import commands
from align.clusters.slurm.submission import ABOUT, Submission
from align.errors import UserError
from align.store.leases import UsedStage
from align.store.store import JOBS, Store


def used_by_jobs(store: Store) -> list[UsedStage]:
    """Stages of every run that has a job of Slurm waiting or running; of all submissions where Slurm does not answer.

    Raises ``UserError`` for a submission whose file is damaged: what its jobs need is not known.
    """
    submissions = []
    for path in sorted((store.root / JOBS).glob(f"*/*/{ABOUT}")):
        try:
            submission = Submission.read(path.parent)
        except FileNotFoundError:
            continue
        except UserError as error:
            raise UserError(f"{error} Until then everything is kept, since its jobs may need it.") from None
        if not submission.is_called_off:
            submissions.append(submission)
    numbers = {number for submission in submissions for number in submission.numbers}
    try:
        states = commands.jobs(numbers, everybodys=True)
    except NoAnswer:
        states = None
    return [
        UsedStage.model_validate(stage)
        for submission in submissions
        if states is None or any(number in states and states[number].is_live for number in submission.numbers)
        for stage in submission.references.values()
    ]
