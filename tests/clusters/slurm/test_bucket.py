"""Jobs whose store has a bucket that only the command line names; the pipeline says nothing of it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from align import Pipeline
from align.clusters.slurm_submission import Submission
from align.clusters.slurm_submit import follow_jobs, submit_run
from align.extensions.sweep.on_cluster import submit_workers
from align.runner.listener import Listener
from align.runner.open_store import Opening
from align.runner.runner import RunOptions, run_pipeline
from align.store.object_store import Bucket
from align.store.store import Store
from tests.support import toy
from tests.support.clusters.slurm.cluster import Slurm
from tests.support.s3_server import SECRET
from tests.support.sweep import toy_sweep


def opened(folder: Path, address: str) -> Store:
    return Opening(str(folder), lease=5, patience=3, remote=address).open()


def test_jobs_upload_artifacts_and_store_no_secret(slurm: Slurm, address: str) -> None:
    store = opened(slurm.store, address)
    submitted = submit_run(Pipeline(toy.pipeline(), base=slurm.folder), RunOptions(store))
    assert follow_jobs(submitted, Listener()).ran
    slurm.wait_until(lambda: all(job["state"] == "COMPLETED" for job in slurm.jobs().values()))  # a job uploads last
    assert {record["stage"] for record in store.remote.all()} == {"one", "two", "total"}
    folder = submitted.submissions["one"].folder
    assert Submission.read(folder).store == Opening.of(store)
    assert not [path for path in folder.iterdir() if SECRET in path.read_text()]
    assert SECRET not in (slurm.state / "calls").read_text()


def test_jobs_fetch_artifacts_made_since_their_submission(slurm: Slurm, address: str) -> None:
    (slurm.state / "held").touch()
    submitted = submit_run(Pipeline(toy.pipeline(), base=slurm.folder), RunOptions(opened(slurm.store, address)))
    new_run = run_pipeline(Pipeline(toy.pipeline()), store=opened(slurm.folder / "other machine", address))
    (slurm.state / "held").unlink()
    run = follow_jobs(submitted, Listener())
    for name, artifact in new_run.artifacts.items():
        assert run.artifacts[name].record == artifact.record


def test_a_worker_of_a_sweep_opens_the_store_of_the_sweep(slurm: Slurm, address: str) -> None:
    store = opened(slurm.store, address)
    sweep = toy_sweep.check(slurm.folder, space={"stages.ppo.height": [0.5]}, sampler="grid", trials=None)
    submission = submit_workers(sweep, store, 1, Namespace(assignments=[], on="slurm"))
    slurm.wait_until(lambda: submission.result("worker-0"))
    assert submission.result("worker-0").status == "done", (submission.folder / "worker-0.log").read_text()
    assert len(store.remote.all()) == 3
    assert all(SECRET.encode() not in (Bucket(address).get(path) or b"") for path in Bucket(address).sizes(""))
