"""Hands the stages of a run that are to be made to Slurm, each as a job that waits for those it reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from align.clusters.follow import NoAnswer
from align.clusters.slurm import commands
from align.clusters.slurm.checks import check_cluster
from align.clusters.slurm.script import sbatch_options, write_script
from align.clusters.slurm.submission import StageJob, Submission, submissions
from align.config.scheduler import SlurmConfig
from align.errors import UserError
from align.pipeline.pipeline import Node, Pipeline
from align.runner.prepare import RunOptions, prepare_run
from align.store.store import Store


@dataclass
class Submitted:
    """Where each stage that is to be made has its job: ``places`` maps a stage to the submission that has it."""

    pipeline: Pipeline
    store: Store
    places: dict[str, Submission] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    """Stages whose jobs were submitted now; those of the others were there already."""
    warnings: list[str] = field(default_factory=list)

    def job(self, stage: str) -> int:
        """Slurm's number of a stage's job."""
        return self.places[stage].job_of(stage).job


def submit_run(pipeline: Pipeline, options: RunOptions) -> Submitted:
    """Submit every stage that is not finished and has no live job yet.

    Raises ``UserError`` where something is wrong with the pipeline, the store or what is asked of the cluster; nothing
    is submitted then, and what was is called off.
    """
    ready = prepare_run(pipeline, options)
    found = Submitted(pipeline, ready.store, warnings=ready.warnings)
    if not ready.wanted:
        return found
    check_cluster(_blocks(pipeline, ready.wanted), ready.store.root, pipeline.where)
    live = _live_jobs(ready.store, pipeline.name, ready.wanted)
    found.places.update({name: place for name, place in live.items() if name not in ready.anew})
    remaining = [node for node in ready.wanted if node.name not in found.places]
    if remaining:
        _submit(found, remaining, ready.anew)
    return found


def _blocks(pipeline: Pipeline, nodes: Iterable[Node]) -> dict[str, SlurmConfig]:
    """What is asked for, by the place in the YAML that says so."""
    own = pipeline.config.runtime.stages
    blocks = {}
    for node in nodes:
        short = next((name for name, rounds in pipeline.expanded.rounds.items() if node.name in rounds), node.name)
        place = next((name for name in (node.name, short) if name in own and own[name].slurm is not None), None)
        blocks["runtime.slurm" if place is None else f"runtime.stages.{place}.slurm"] = pipeline.runtimes[
            node.name
        ].slurm
    return blocks


def _with_nodes(pipeline: Pipeline, node: Node) -> SlurmConfig:
    """What the stage asks for, with as many nodes as it trains on; ``UserError`` where it asks for fewer."""
    block, launch = pipeline.runtimes[node.name].slurm, pipeline.runtimes[node.name].launch
    needed = launch.nodes if node.stage.distributed else 1
    if block.nodes is None:
        return block.model_copy(update={"nodes": needed})
    if block.nodes < needed:
        raise UserError(
            f"{pipeline.where}: stage '{node.name}' trains on {needed} nodes (runtime.launch), and its job is to have "
            f"{block.nodes} (runtime.slurm.nodes). Leave that out, or make them equal."
        )
    return block


def _live_jobs(store: Store, run: str, wanted: list[Node]) -> dict[str, Submission]:
    """Which of these stages an earlier submission of the run still has a job for."""
    keys = {node.name: node.key for node in wanted}
    known = [
        (one, job)
        for one in submissions(store, run)
        if not one.is_called_off
        for job in one.stages
        if keys.get(job.stage) == job.key
    ]
    try:
        states = commands.jobs({job.job for _, job in known})
    except NoAnswer as error:
        raise UserError(f"--on slurm: Slurm does not answer ({error}). Nothing was submitted.") from None
    found: dict[str, Submission] = {}
    for one, job in known:
        if job.job in states and states[job.job].is_live:
            found.setdefault(job.stage, one)
    return found


def _submit(found: Submitted, nodes: list[Node], anew: set[str]) -> None:
    pipeline, store = found.pipeline, found.store
    submission = Submission.begin(store, pipeline, pipeline.name)
    asked: dict[str, tuple[list[str], Path]] = {}
    for node in nodes:
        block = _with_nodes(pipeline, node)
        what = f"stage {node.name} of {pipeline.name}"
        script = submission.folder / f"{node.name}.sh"
        write_script(script, what, [str(submission.folder), node.name], block.setup)
        name = f"align:{pipeline.name}:{node.name}"
        asked[node.name] = (sbatch_options(block, name, submission.folder, pipeline.base, f"{node.name}.log"), script)
    at = ""
    try:
        for node in nodes:
            at = node.name
            commands.check(*asked[node.name])
        store.remember_run(pipeline.name, pipeline.references, pipeline.plain)
        for node in nodes:
            at = node.name
            before = store.find_intact(node.stage.kind, node.key, node.name)
            options, script = asked[node.name]
            after = [found.job(name) for name in node.input_names if name in found.places]
            number = commands.submit([*options, *dependency(after)], script)
            replaces = None if before is None else str(before.record["created"])
            submission.stages.append(
                StageJob(node.name, node.stage.kind, node.key, number, node.name in anew, replaces)
            )
            submission.write()
            found.places[node.name] = submission
            found.new.append(node.name)
    except NoAnswer as error:
        call_off([submission])
        raise UserError(
            f"{pipeline.where}: stage '{at}': Slurm does not take its job ({error}). Change runtime.slurm, or "
            f"runtime.stages.{at}.slurm; nothing is left submitted."
        ) from None
    except BaseException:  # Ctrl-C: half a run is of no use
        call_off([submission])
        raise


def dependency(after: list[int]) -> list[str]:
    """sbatch's options for a job that waits until the jobs ``after`` have done their work, and ends if one has not."""
    if not after:
        return []
    return [f"--dependency=afterok:{':'.join(map(str, dict.fromkeys(after)))}", "--kill-on-invalid-dep=yes"]


def call_off(found: Iterable[Submission], stages: set[str] | None = None) -> list[int]:
    """End what lives of these submissions' jobs, all or those of ``stages``; returns Slurm's numbers of those ended."""
    ended: list[int] = []
    for one in found:
        chosen = {job.job for job in one.stages if stages is None or job.stage in stages}
        if one.sweep is not None and stages is None and one.sweep.get("job") is not None:
            chosen.add(int(one.sweep["job"]))
        live = [number for number, job in commands.jobs(chosen).items() if job.is_live]
        if stages is None:
            one.call_off()
        commands.cancel(live)
        ended += live
    return ended


__all__ = ["Submitted", "call_off", "dependency", "submit_run"]
