"""Submit a run's stages to Slurm, each as a job that waits for its inputs; follow and cancel jobs. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from align.clusters import slurm_commands
from align.clusters.follow import JobFollower, JobResult, JobState, SchedulerError, executor_settings
from align.clusters.slurm_commands import check_cluster
from align.clusters.slurm_submission import ABOUT, StageJob, Submission, sbatch_options, submissions, write_script
from align.config.runtime.executor import SlurmExecutor
from align.config.user_functions import module_folders
from align.errors import UserError
from align.pipeline.pipeline import Node, Pipeline
from align.runner.listener import Listener
from align.runner.runner import Run, RunOptions, prepare_run
from align.store.record import StageReference
from align.store.store import JOBS, Store


@dataclass
class SubmittedRun:
    """The jobs of a run's unfinished stages. ``submissions`` maps a stage to the submission with its job."""

    pipeline: Pipeline
    store: Store
    submissions: dict[str, Submission] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    """Stages whose jobs were submitted now; the others' were there already."""
    warnings: list[str] = field(default_factory=list)

    def job(self, stage: str) -> int:
        """Return Slurm's number of a stage's job."""
        return self.submissions[stage].job_of(stage).job


def submit_run(pipeline: Pipeline, options: RunOptions) -> SubmittedRun:
    """Submit every stage that is not finished and has no live job yet.

    Raises ``UserError`` if something is wrong with the pipeline, the store or what is asked of the cluster; jobs
    that were submitted until then are cancelled.
    """
    ready = prepare_run(pipeline, options)
    run = SubmittedRun(pipeline, ready.store, warnings=ready.warnings)
    if not ready.wanted:
        return run
    check_cluster(_slurm_blocks(pipeline, ready.wanted), ready.store.root, pipeline.where)
    live = _live_submissions(ready.store, pipeline.name, ready.wanted)
    # A forced stage gets a new job; for the others the job that is there will do.
    run.submissions.update({name: submission for name, submission in live.items() if name not in ready.force})
    remaining = [node for node in ready.wanted if node.name not in run.submissions]
    if remaining:
        _submit(run, remaining, ready.force)
    return run


def _slurm_blocks(pipeline: Pipeline, nodes: Iterable[Node]) -> dict[str, SlurmExecutor]:
    """Return the stages' Slurm settings by their place in the YAML."""
    per_stage = pipeline.config.runtime.stages
    blocks = {}
    for node in nodes:
        place = "runtime.executor"
        # A round of a loop has its own settings, else the settings of its stage in all rounds.
        for name in (node.name, pipeline.expanded.without_round(node.name)):
            if name in per_stage and per_stage[name].executor is not None:
                place = f"runtime.stages.{name}.executor"
                break
        blocks[place] = executor_settings(pipeline, SlurmExecutor, node.name)
    return blocks


def _with_nodes(pipeline: Pipeline, node: Node) -> SlurmExecutor:
    """Return a stage's settings with as many nodes as it trains on. Raises ``UserError`` if they ask for fewer."""
    block = executor_settings(pipeline, SlurmExecutor, node.name)
    launch = pipeline.runtimes[node.name].launch
    # Only stages that can train on several nodes get them.
    needed = launch.nodes if node.stage.distributed else 1
    if block.nodes is None:
        return block.model_copy(update={"nodes": needed})
    if block.nodes < needed:
        raise UserError(
            f"{pipeline.where}: stage '{node.name}' trains on {needed} nodes (runtime.launch), and its job is to have "
            f"{block.nodes} (runtime.executor.nodes). Leave that out, or make them equal."
        )
    return block


def _live_submissions(store: Store, run: str, nodes: list[Node]) -> dict[str, Submission]:
    """Return the earlier submissions of the run that still have a live job for any of these stages."""
    keys = {node.name: node.key for node in nodes}
    candidates = []
    for submission in submissions(store, run):
        if not submission.is_cancelled:
            # A job for another key is of an older version of the pipeline.
            candidates += [(submission, job) for job in submission.stages if keys.get(job.stage) == job.key]
    try:
        states = slurm_commands.jobs({job.job for _, job in candidates})
    except SchedulerError as error:
        raise UserError(f"executor slurm: Slurm does not answer ({error}). Nothing was submitted.") from None
    live: dict[str, Submission] = {}
    for submission, job in candidates:
        if job.job in states and states[job.job].is_live:
            # The newest submission comes first, and its job counts.
            live.setdefault(job.stage, submission)
    return live


def _submit(run: SubmittedRun, nodes: list[Node], force: set[str]) -> None:
    """Submit jobs for these stages: all of them, or none."""
    pipeline = run.pipeline
    store = run.store
    submission = Submission.begin(store, pipeline, pipeline.name)
    requests = {node.name: _prepare_job(pipeline, node, submission) for node in nodes}
    stage = ""
    try:
        # 1. Slurm checks all jobs before the first is submitted.
        for node in nodes:
            stage = node.name
            slurm_commands.check(*requests[stage])
        # From here on the run's record keeps ``gc`` from what the jobs need.
        store.remember_run(pipeline.name, pipeline.references, pipeline.plain, module_folders())
        # 2. Stages come in the pipeline's order, so the jobs that one depends on have numbers.
        for node in nodes:
            stage = node.name
            artifact = store.find_intact(node.stage.kind, node.key, stage)
            # An input without a job is finished already.
            inputs = [run.job(name) for name in node.input_names if name in run.submissions]
            options, script = requests[stage]
            number = slurm_commands.submit([*options, *dependency(inputs)], script)
            replaces = None if artifact is None else str(artifact.record["created"])
            job = StageJob(stage, node.stage.kind, node.key, number, stage in force, replaces)
            # 3. Every number is written at once: an unknown job could not be cancelled.
            submission.stages.append(job)
            submission.write()
            run.submissions[stage] = submission
            run.new.append(stage)
    except SchedulerError as error:
        raise UserError(
            f"{pipeline.where}: stage '{stage}': Slurm refuses its job ({error}). Change runtime.executor, or "
            f"runtime.stages.{stage}.executor; {_take_back(submission)}."
        ) from None
    except BaseException:  # Ctrl-C: half a run is of no use
        cancel_jobs([submission])
        raise


def _take_back(submission: Submission) -> str:
    """Cancel the jobs of a submission that failed; return what is left of them, in words."""
    try:
        cancel_jobs([submission])
    except SchedulerError:  # what has refused the job may be a Slurm that is away
        numbers = " ".join(str(job.job) for job in submission.stages)
        return f"Slurm does not cancel the others either: scancel {numbers}" if numbers else "nothing is left submitted"
    return "nothing is left submitted"


def _prepare_job(pipeline: Pipeline, node: Node, submission: Submission) -> tuple[list[str], Path]:
    """Write the script of a stage's job; return sbatch's options and the script."""
    block = _with_nodes(pipeline, node)
    script = submission.folder / f"{node.name}.sh"
    title = f"stage {node.name} of {pipeline.name}"
    write_script(script, title, [str(submission.folder), node.name], block.setup)
    name = f"align:{pipeline.name}:{node.name}"
    return sbatch_options(block, name, submission.folder, pipeline.base, f"{node.name}.log"), script


def dependency(jobs: list[int]) -> list[str]:
    """Return sbatch's options for a job that starts when ``jobs`` have succeeded, and ends if any of them has not."""
    if not jobs:
        return []
    return [f"--dependency=afterok:{':'.join(map(str, dict.fromkeys(jobs)))}", "--kill-on-invalid-dep=yes"]


def cancel_jobs(targets: Iterable[Submission], stages: set[str] | None = None) -> list[int]:
    """Cancel the live jobs of these submissions, all or only of ``stages``; returns their numbers."""
    cancelled: list[int] = []
    for submission in targets:
        numbers = submission.numbers
        if stages is not None:
            numbers = {job.job for job in submission.stages if job.stage in stages}
        # Ask first: if Slurm does not answer, no job counts as cancelled, and ``gc`` keeps what the jobs need.
        live = [number for number, job in slurm_commands.jobs(numbers).items() if job.is_live]
        if stages is None:
            submission.mark_cancelled()  # before the jobs end: none may requeue itself
        slurm_commands.cancel(live)
        cancelled += live
    return cancelled


def used_by_jobs(store: Store) -> list[StageReference]:
    """Return the stages of every run that has a job waiting or running, which ``align gc`` must keep.

    Where Slurm does not answer, the stages of all submissions are returned. Raises ``UserError`` for a submission whose
    file is damaged: what its jobs need is not known.
    """
    active = []
    for path in sorted((store.root / JOBS).glob(f"*/*/{ABOUT}")):
        try:
            submission = Submission.read(path.parent)
        except FileNotFoundError:
            continue
        except UserError as error:
            raise UserError(f"{error} Until then nothing is deleted, since its jobs may need it.") from None
        if not submission.is_cancelled:
            active.append(submission)
    # Other users' jobs count too: a store may be shared by a group.
    numbers = {number for submission in active for number in submission.numbers}
    try:
        states = slurm_commands.jobs(numbers, all_users=True)
    except SchedulerError:
        states = None
    used = []
    for submission in active:
        is_live = states is None or any(number in states and states[number].is_live for number in submission.numbers)
        if is_live:
            used += [StageReference.model_validate(stage) for stage in submission.references.values()]
    return used


class SlurmQueue:
    """The jobs of ``run``."""

    name = "Slurm"
    every = 5.0  # its controller has many users

    def __init__(self, run: SubmittedRun) -> None:
        self.run = run

    def query(self, stages: Collection[str]) -> dict[str, JobState]:
        """Return the states of these stages' jobs. Raises ``SchedulerError``."""
        jobs = slurm_commands.jobs({self.run.job(stage) for stage in stages})
        return {stage: self._state(stage, jobs.get(self.run.job(stage))) for stage in stages}

    def _state(self, stage: str, job: slurm_commands.Job | None) -> JobState:
        number = self.run.job(stage)
        # Slurm has forgotten the job, so its end is unknown.
        if job is None:
            return JobState("gone", f"its job is gone and has left no artifact (job {number})")
        if job.waits:
            return JobState("waits", f"job {number} waits" + (f" ({job.reason})" if job.reason else ""))
        if job.is_live:
            return JobState("runs", f"job {number} runs on {job.nodes}")
        # A shared file system may show the artifact late, so this is no failure yet.
        if job.state == "COMPLETED":
            return JobState("gone", f"its job is done, but its artifact is missing (job {number})")
        block = executor_settings(self.run.pipeline, SlurmExecutor, stage)
        place = f"runtime.stages.{stage}.executor"
        remedies = {
            "TIMEOUT": f"Raise {place}.time (now {block.time or 'the partition has its own'}).",
            "OUT_OF_MEMORY": f"Raise {place}.memory_gb (now {block.memory_gb or 'the partition has its own'}).",
        }
        description = f"{slurm_commands.OVER.get(job.state, job.state)} (job {number})"
        return JobState("over", description, remedies.get(job.state, ""))

    def result(self, stage: str) -> JobResult | None:
        """Return the result of the job's last turn; None if no turn has ended."""
        return self.run.submissions[stage].result(stage)

    def log(self, stage: str) -> Path:
        """Return the file that the job prints to."""
        return self.run.submissions[stage].log(stage)

    def replaces(self, stage: str) -> str | None:
        """Return the creation time of the artifact that a forced stage replaces."""
        job = self.run.submissions[stage].job_of(stage)
        return job.replaces if job.force else None


def follow_jobs(submitted: SubmittedRun, listener: Listener) -> Run:
    """Report the jobs to ``listener`` until all are over. Raises ``StageFailed`` once a job has failed."""
    queue = SlurmQueue(submitted)
    return JobFollower(submitted.pipeline, submitted.store, submitted.submissions, queue, listener).follow()
