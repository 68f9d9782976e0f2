"""Runs as jobs: stages in their order, what is said of failures, stops that go on, runs taken up and called off.

Slurm's commands are stood in for; the same on a real Slurm is in ``test_real_slurm.py``.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.cli.main import main
from align.clusters import follow as following
from align.clusters.slurm_submission import submissions
from align.clusters.slurm_submit import cancel_jobs, follow_jobs, submit_run
from align.errors import StageFailed, UserError
from align.pipeline.pipeline import Node
from align.runner.listener import Listener
from align.runner.runner import Run, RunOptions, run_pipeline
from align.store.json_files import write_sealed
from align.store.store import Store
from tests.support import toy
from tests.support.clusters.slurm.cluster import Slurm
from tests.support.runs import wait_for


class Recorder(Listener):
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def stage_queued(self, node: Node, how: str) -> None:
        self.said.append((node.name, how.partition(" (")[0].rstrip("0123456789")))

    def stage_started(self, node: Node, folder: Path, resumed: bool) -> None:
        self.said.append((node.name, "resumes" if resumed else "starts"))

    def stage_done(self, node: Node, artifact: Any) -> None:
        self.said.append((node.name, "done"))

    def stage_cached(self, node: Node, artifact: Any) -> None:
        self.said.append((node.name, "cached"))

    def stage_failed(self, node: Node, message: str, log: Path) -> None:
        self.said.append((node.name, "failed"))

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        if event["event"] == "note":
            self.said.append((node.name, event["message"]))


def here(raw: dict[str, Any], slurm: Slurm, listener: Listener | None = None, **options: Any) -> Run:
    """Submit and follow in this process."""
    raw = raw | {"runtime": {"executor": "slurm", **raw.get("runtime", {})}}
    return Pipeline(raw, base=slurm.folder).run(store=slurm.store, listener=listener, **options)


def test_jobs_wait_for_inputs_and_equal_a_local_run(slurm: Slurm) -> None:
    recorder = Recorder()
    raw = toy.pipeline() | {
        "runtime": {
            "executor": {"name": "slurm", "partition": "cpu"},
            "stages": {"two": {"executor": {"cpus": 3}}},
        }
    }
    run = here(raw, slurm, recorder)
    assert sorted(run.ran) == ["one", "total", "two"]
    plain = run_pipeline(Pipeline(toy.pipeline()), store=slurm.folder / "plain")
    for name, artifact in plain.artifacts.items():
        assert run.artifacts[name].record["key"] == artifact.record["key"]
        assert run.metrics(name) == artifact.record["metrics"]
    jobs = slurm.jobs()
    first, second, total = (jobs[f"align:toy:{name}"] for name in ("one", "two", "total"))
    assert total["options"]["dependency"] == f"afterok:{first['number']}:{second['number']}"
    assert total["options"]["kill-on-invalid-dep"] == "yes"
    assert (first["options"]["partition"], second["options"]["partition"]) == ("cpu", "cpu")
    assert "cpus-per-task" not in first["options"] and second["options"]["cpus-per-task"] == "3"
    assert recorder.said.index(("one", "done")) < recorder.said.index(("total", "starts"))
    assert ("total", "job  waits") in [(n, h.replace(first["number"], "")) for n, h in recorder.said] or recorder.said
    # The last job writes it once its stage is done, which is what ends the run.
    wait_for((slurm.store / "reports" / "toy" / "report.html").is_file)
    again = Recorder()
    assert here(raw, slurm, again).ran == []
    assert again.said == [("one", "cached"), ("two", "cached"), ("total", "cached")]
    assert len(slurm.jobs()) == 3


def test_a_failed_stage_ends_what_reads_it_and_the_rest_is_made(slurm: Slurm) -> None:
    recorder = Recorder()
    with pytest.raises(StageFailed) as caught:
        here(toy.pipeline(one={"crash": "bug"}, two={"pause": 0.1}), slurm, recorder)
    message = str(caught.value)
    assert "stage 'one' failed: ValueError: a bug\nLog: " in message
    assert "stage 'total' did not start: its input 'one' failed." in message
    assert ("two", "done") in recorder.said
    log = Path(message.partition("Log: ")[2].splitlines()[0])
    assert "Traceback" in log.read_text()
    assert slurm.jobs()["align:toy:total"]["state"] == "CANCELLED"
    assert here(toy.pipeline(two={"pause": 0.1}), slurm).ran == ["one", "total"]


@pytest.mark.slow
def test_a_wrong_input_found_in_a_job_reads_as_it_does_here(slurm: Slurm) -> None:
    with pytest.raises(StageFailed, match="stage 'one' failed: the dataset is empty after filtering."):
        here({**toy.pipeline(one={"crash": "user"})}, slurm)


@pytest.mark.slow
def test_the_command_follows_reports_and_says_how_things_are(slurm: Slurm) -> None:
    file = slurm.write(toy.pipeline() | {"runtime": {"executor": {"name": "slurm", "partition": "gpu"}}})
    code, output = slurm.align("run", file)
    assert code == 0, output
    assert "✓ total" in output and "Report: " in output
    assert slurm.jobs()["align:toy:total"]["options"]["partition"] == "gpu"
    code, output = slurm.align("status", "toy", "--json")
    assert [stage["state"] for stage in json.loads(output)["toy"]] == ["done", "done", "done"]
    assert "3 done" in slurm.align("status")[1]
    code, output = slurm.align("run", file, "--detach")
    assert (code, output) == (0, "Nothing to do: every stage is finished.\n")
    code, output = slurm.align("run", file, "--on", "local")
    assert code == 0 and "! --on local: the file's fields for slurm are not used (runtime.executor)." in output, output


@pytest.mark.slow
def test_detached_jobs_are_followed_again_and_cancelled(slurm: Slurm) -> None:
    (slurm.state / "held").touch()
    file = slurm.write(toy.pipeline())
    code, message = slurm.align("run", file, "--on", "slurm", "--detach", "--json")
    assert code == 0, message
    first = json.loads(message)
    assert sorted(first["new"]) == ["one", "total", "two"]
    again = json.loads(slurm.align("run", file, "--on", "slurm", "--detach", "--json")[1])
    assert again["jobs"] == first["jobs"] and again["new"] == []
    message = slurm.align("status", "toy")[1]
    assert f"waits      job {first['jobs']['one']} (Resources)" in message
    code, message = slurm.align("cancel", "toy", "one")
    assert (code, message) == (0, f"ended job {first['jobs']['one']}; finished stages and checkpoints are kept\n")
    slurm.wait_until(lambda: slurm.jobs()["align:toy:total"]["state"] == "CANCELLED")
    assert slurm.jobs()["align:toy:two"]["state"] == "PENDING"
    code, message = slurm.align("cancel", "toy")
    assert f"ended job {first['jobs']['two']};" in message
    slurm.wait_until(lambda: slurm.jobs()["align:toy:two"]["state"] == "CANCELLED")
    assert slurm.align("cancel", "toy")[1] == "'toy' has nothing that waits or runs\n"
    (slurm.state / "held").unlink()
    assert sorted(here(toy.pipeline(), slurm).ran) == ["one", "total", "two"]


def test_stopped_job_saves_requeues_and_continues(slurm: Slurm) -> None:
    raw = toy.pipeline(one={"steps": 40, "pause": 0.1, "stops": True})
    file = slurm.write(raw)
    process = slurm.align("run", file, "--on", "slurm", wait=False)
    slurm.wait_until(lambda: slurm.checkpoints() >= 2)
    job = slurm.jobs()["align:toy:one"]["number"]
    slurm.wait_until(lambda: slurm.jobs()["align:toy:one"]["state"] == "RUNNING")

    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    assert "stopped as asked, at step" in output and "Its job is requeued." in output
    assert "one    resumes" in output
    (artifact,) = [entry for entry in Store.open(slurm.store).all() if entry.stage == "one"]
    assert artifact.record["metrics"]["resumed_at"] >= 2
    assert len(artifact.record["attempts"]) == 2
    assert slurm.jobs()["align:toy:one"]["turn"] == 1


@pytest.mark.slow
def test_a_job_called_off_while_it_stops_does_not_come_back(slurm: Slurm) -> None:
    pipeline = Pipeline(toy.pipeline(one={"steps": 400, "pause": 0.1, "stops": True}), base=slurm.folder)
    store = Store.open(slurm.store)
    submit_run(pipeline, RunOptions(store))
    slurm.wait_until(lambda: slurm.checkpoints() >= 2)
    (place,) = submissions(store, "toy")
    assert len(cancel_jobs([place])) in (2, 3)  # two may be done by now
    slurm.wait_until(lambda: all(job["state"] in ("CANCELLED", "COMPLETED") for job in slurm.jobs().values()))
    assert slurm.jobs()["align:toy:one"]["turn"] == 0
    assert place.result("one").status == "stopped"
    assert "Not requeued." in place.log("one").read_text()


def began(slurm: Slurm) -> int:
    """How often the stage's process was started."""
    return sum(log.read_text().count("--- ") for log in slurm.store.glob("number/*.partial/log.txt"))


@pytest.mark.slow
def test_a_job_that_gets_nowhere_in_its_turns_is_given_up(slurm: Slurm) -> None:
    raw = toy.pipeline(one={"steps": 400, "pause": 60, "stops": True}) | {
        "runtime": {"executor": {"name": "slurm", "grace": 10}}
    }
    raw["stages"] = {"one": raw["stages"]["one"]}
    pipeline = Pipeline(raw, base=slurm.folder)
    submitted = submit_run(pipeline, RunOptions(slurm.store))
    place = submitted.submissions["one"]
    for turn in range(3):
        slurm.wait_until(lambda turn=turn: began(slurm) == turn + 1)
        for _ in range(2):  # twice: without patience
            subprocess.run(["scancel", "--signal=USR1", slurm.jobs()["align:toy:one"]["number"]], check=True)
            time.sleep(0.5)
        slurm.wait_until(lambda turn=turn: (message := place.result("one")) is not None and message.turn == turn)
    assert place.result("one").status == "failed"
    assert "3 turns of its job in a row ended without a new checkpoint" in place.result("one").message
    assert "runtime.stages.one.executor.time" in place.result("one").message


@pytest.mark.slow
def test_rebuilding_replaces_what_is_there_once(slurm: Slurm) -> None:
    here(toy.pipeline(), slurm)
    before = {artifact.stage: artifact.record["created"] for artifact in Store.open(slurm.store).all()}
    assert sorted(here(toy.pipeline(), slurm, from_="two").ran) == ["total", "two"]
    after = {artifact.stage: artifact.record["created"] for artifact in Store.open(slurm.store).all()}
    assert after["one"] == before["one"] and after["two"] > before["two"] and after["total"] > before["total"]
    assert "dependency" not in slurm.jobs()["align:toy:two"]["options"]


@pytest.mark.slow
def test_job_refuses_a_pipeline_whose_files_changed(slurm: Slurm) -> None:
    (slurm.state / "held").touch()
    raw = toy.pipeline()
    submitted = submit_run(Pipeline(raw, base=slurm.folder), RunOptions(slurm.store))
    about = submitted.submissions["one"].folder / "submission.json"
    document = json.loads(about.read_text())
    document["raw"]["stages"]["one"]["number"] = 9
    del document["seal"]
    write_sealed(about, document)
    (slurm.state / "held").unlink()
    slurm.wait_until(lambda: submitted.submissions["one"].result("one"))
    result = submitted.submissions["one"].result("one")
    assert "stage 'one' has another key than when it was submitted" in result.message


def test_gc_keeps_what_jobs_that_wait_will_need(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run of the name has been made since, so only the jobs still reach these stages."""
    store = Store.open(slurm.store)
    run_pipeline(Pipeline(toy.pipeline()), store=store, only="one")
    (slurm.state / "held").touch()
    submit_run(Pipeline(toy.pipeline(), base=slurm.folder), RunOptions(slurm.store))
    run_pipeline(Pipeline(toy.pipeline(one={"number": 9})), store=store, only="one")
    first = store.folder("number", Pipeline(toy.pipeline()).nodes["one"].key)
    assert main(["gc", "--delete", "--store", str(slurm.store)]) == 0 and first.exists()
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "/usr/bin:/bin")  # no Slurm here: what it would say is not known
        assert main(["gc", "--delete", "--store", str(slurm.store)]) == 0 and first.exists()
    (submission,) = submissions(store)
    about = submission.folder / "submission.json"
    content = about.read_bytes()
    about.write_bytes(content[:-9])
    assert main(["gc", "--delete", "--store", str(slurm.store)]) == 2 and first.exists()
    about.write_bytes(content)
    cancel_jobs(submissions(store))
    assert main(["gc", "--delete", "--store", str(slurm.store)]) == 0 and not first.exists()


def test_damaged_stage_is_rebuilt_by_its_own_job(slurm: Slurm) -> None:
    run = run_pipeline(Pipeline(toy.pipeline(two={"pause": 0.5})), store=slurm.store)
    (run.artifacts["two"].path / "record.json").write_text("")
    shutil.rmtree(run.artifacts["one"].path)
    again = here(toy.pipeline(two={"pause": 0.5}), slurm, rebuild=("two",))
    assert sorted(again.ran) == ["one", "two"]


def test_a_job_that_vanishes_without_a_word_is_noticed(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LATE_SECONDS", 0.5)
    (slurm.state / "held").touch()
    submitted = submit_run(Pipeline(toy.pipeline(), base=slurm.folder), RunOptions(slurm.store))
    monkeypatch.setattr("align.clusters.slurm_commands.jobs", lambda numbers: {})
    with pytest.raises(StageFailed, match=r"stage 'one' failed: its job is gone.*It left no log: does the machine it"):
        follow_jobs(submitted, Listener())


@pytest.mark.slow
def test_silent_controller_is_given_up_after_a_wait(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.clusters.slurm_commands.PAUSE", 0.05)
    (slurm.state / "held").touch()
    submitted = submit_run(Pipeline(toy.pipeline(), base=slurm.folder), RunOptions(slurm.store))
    (slurm.state / "silent").touch()
    monkeypatch.setattr(following, "SILENT_SECONDS", 1.0)
    with pytest.raises(StageFailed, match="Slurm has not answered for .* Unable to contact slurm controller"):
        follow_jobs(submitted, Listener())
    with pytest.raises(UserError, match="Slurm does not answer"):
        submit_run(Pipeline(toy.pipeline(), base=slurm.folder), RunOptions(slurm.store))
    (slurm.state / "silent").unlink()
    (slurm.state / "held").unlink()
    assert sorted(follow_jobs(submitted, Listener()).ran) == ["one", "total", "two"]


@pytest.mark.slow
def test_ctrl_c_ends_following_and_no_job(slurm: Slurm) -> None:
    file = slurm.write(toy.pipeline(one={"steps": 20, "pause": 0.2}))
    process = slurm.align("run", file, "--on", "slurm", wait=False)
    slurm.wait_until(lambda: slurm.checkpoints() >= 1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "No longer followed; its jobs go on." in output
    code, output = slurm.align("run", file, "--on", "slurm")
    assert code == 0, output
    assert len(slurm.jobs()) == 3
