"""Calls to Slurm, and what is checked before a submission."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.clusters import slurm_commands
from align.clusters.follow import SchedulerError
from align.clusters.slurm_commands import file_system
from align.clusters.slurm_submission import sbatch_options, submissions, write_script
from align.clusters.slurm_submit import submit_run
from align.config.runtime import Runtime
from align.config.runtime.executor import SlurmExecutor, seconds_of
from align.errors import UserError
from align.runner.runner import RunOptions
from align.store.store import Store
from tests.support import toy
from tests.support.clusters.slurm.cluster import Slurm

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

    monkeypatch.setattr(slurm_commands, "run_command", ask)
    return calls


def test_forgotten_jobs_are_looked_up_in_one_call(queue_calls: list[list[str]]) -> None:
    """One question for each made `align gc` slow in proportion to all jobs that there ever were."""
    states = {number: job.state for number, job in slurm_commands.jobs([101, 102, 103, 105]).items()}
    assert states == {101: "RUNNING", 102: "CANCELLED", 103: "COMPLETED"}
    assert [command[0] for command in queue_calls] == ["squeue", "sacct"]
    assert "--jobs=102,103,105" in queue_calls[1]
    assert slurm_commands.jobs([101]).keys() == {101} and len(queue_calls) == 3


def test_the_jobs_of_other_users_are_asked_for_where_they_count(queue_calls: list[list[str]]) -> None:
    slurm_commands.jobs([101])
    slurm_commands.jobs([101], all_users=True)
    assert ["--me" in command for command in queue_calls] == [True, False]


def refused(on: Slurm, **runtime: object) -> str:
    """The error of submitting, which leaves nothing submitted."""
    with pytest.raises(UserError) as caught:
        submit_run(Pipeline(toy.pipeline() | {"runtime": runtime}, "toy.yaml", base=on.folder), RunOptions(on.store))
    on.wait_until(lambda: all(job["state"] == "CANCELLED" for job in on.jobs().values()))
    return str(caught.value)


def test_without_slurm_the_remedy_is_named(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(slurm.folder))
    assert "there is no sbatch here. Run this on a login node" in refused(slurm)


def test_an_unknown_partition_is_named_with_its_place(slurm: Slurm) -> None:
    assert refused(slurm, executor={"name": "slurm", "partition": "gqu"}) == (
        "toy.yaml: runtime.executor.partition: there is no partition 'gqu' in this cluster. Did you mean 'gpu'?"
    )
    assert "toy.yaml: runtime.stages.two.executor.partition: there is no partition 'x'" in refused(
        slurm, executor="slurm", stages={"two": {"executor": {"partition": "x"}}}
    )
    assert "there is no partition 'cpi'" in refused(slurm, executor={"name": "slurm", "partition": "gpu,cpi"})


def test_several_partitions_are_known_each_by_its_name(slurm: Slurm) -> None:
    executor = {"name": "slurm", "partition": "gpu,cpu"}
    submit_run(
        Pipeline(toy.pipeline() | {"runtime": {"executor": executor}}, base=slurm.folder), RunOptions(slurm.store)
    )
    slurm.wait_until(lambda: len(slurm.jobs()) == 3)


def test_a_store_that_no_node_sees_is_refused(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm.state / "hosts").write_text("node1\nnode2\n")
    monkeypatch.setattr(slurm_commands, "file_system", lambda path: "ext4")
    refusal = refused(slurm)
    assert "is on a local file system (ext4)" in refusal and "shared_store: true" in refusal
    submit_run(
        Pipeline(
            toy.pipeline() | {"runtime": {"executor": {"name": "slurm", "shared_store": True}}}, base=slurm.folder
        ),
        RunOptions(slurm.store),
    )
    monkeypatch.setattr(slurm_commands, "file_system", lambda path: "nfs4")
    submit_run(Pipeline(toy.pipeline() | {"seed": 9}, base=slurm.folder), RunOptions(slurm.store))


def test_refused_job_names_its_stage_and_cancels_the_others(slurm: Slurm) -> None:
    (slurm.state / "refuses").write_text("--job-name=align:toy:total")
    refusal = refused(slurm)
    assert "toy.yaml: stage 'total': Slurm refuses its job" in refusal and "not like this" in refusal
    assert slurm.jobs() == {}  # it was asked of all stages before the first was handed in
    (slurm.state / "refuses").write_text("--dependency=afterok")
    assert "nothing is left submitted" in refused(slurm)
    slurm.wait_until(lambda: all(job["state"] == "CANCELLED" for job in slurm.jobs().values()) and slurm.jobs())
    assert all(submission.is_cancelled for submission in submissions(Store.open(slurm.store)))


def test_jobs_that_slurm_cannot_be_asked_to_cancel_are_named(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm goes away in the middle: the first job is in its queue, the second is not, and no answer comes any more."""

    def unreachable(numbers: Any, **options: Any) -> Any:
        raise SchedulerError("squeue: Unable to contact slurm controller")

    (slurm.state / "refuses").write_text("--dependency=afterok")
    submit = slurm_commands.submit

    def submit_until_gone(options: list[str], script: Path) -> int:
        try:
            return submit(options, script)
        except SchedulerError:
            monkeypatch.setattr(slurm_commands, "jobs", unreachable)
            raise

    monkeypatch.setattr(slurm_commands, "submit", submit_until_gone)
    with pytest.raises(UserError, match="Slurm refuses its job") as caught:
        submit_run(Pipeline(toy.pipeline(), "toy.yaml", base=slurm.folder), RunOptions(slurm.store))
    (submission,) = submissions(Store.open(slurm.store))
    assert len(submission.stages) == len(slurm.jobs()) == 2
    left = " ".join(str(job.job) for job in submission.stages)
    assert f"Slurm does not cancel the others either: scancel {left}." in str(caught.value)
    assert not submission.is_cancelled  # its jobs may run, so gc keeps what they need, and a rerun finds them


def test_file_system_is_the_innermost_mount_s(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/vda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n"
        "tmpfs /home/a\\040b tmpfs rw 0 0\nnone /homes xfs rw 0 0\n"
        "server:/data /büro\\134\\011x nfs4 rw 0 0\n",
        encoding="utf-8",
    )
    assert file_system(Path("/usr"), mounts) == "ext4"
    assert file_system(Path("/home/me/store"), mounts) == "nfs4"
    assert file_system(Path("/home/a b/store"), mounts) == "tmpfs"
    assert file_system(Path("/büro\\\tx/store"), mounts) == "nfs4"
    assert file_system(Path("/home"), tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dependency": "afterok:1"}, "sbatch's --dependency is set by what a stage reads; remove it here"),
        ({"mem": "4G"}, "sbatch's --mem is set by memory_gb"),
        ({"--mail-type": "END"}, "write a long option without its dashes"),
    ],
)
def test_options_that_are_set_here_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pipeline(toy.pipeline() | {"runtime": {"executor": {"name": "slurm", "sbatch": settings}}}, "toy.yaml")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("02:00:00", 7200),
        ("1-2", 93600),
        ("1-02:30", 95400),
        ("2-00:00:01", 172801),
        ("120", 7200),
        ("120:00", 7200),
        ("100:00:00", 360_000),
        ("1:5", 65),
    ],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds
    assert SlurmExecutor(time=time).time == time


@pytest.mark.parametrize("time", ["", "2h", "1:00:00:00", "1-", "-5", "1:00\n"])
def test_invalid_time_is_refused_with_examples(time: str) -> None:
    with pytest.raises(ValueError, match=r'is not a time of Slurm; write "90" \(minutes\), "12:00:00"'):
        SlurmExecutor(time=time)


def test_a_time_limit_that_leaves_no_time_is_refused() -> None:
    short = {"executor": {"name": "slurm", "grace": 10}, "stages": {"two": {"executor": {"time": "00:02:10"}}}}
    assert Runtime.model_validate(short).for_stage("two").executor == SlurmExecutor(time="00:02:10", grace=10)
    with pytest.raises(ValueError, match="time 00:02:59 leaves a stage no time before it is told to stop"):
        Runtime(executor=SlurmExecutor(time="00:02:59", grace=60))


def test_options_say_what_was_asked_for_and_no_more(tmp_path: Path) -> None:
    plain = sbatch_options(SlurmExecutor(), "n", tmp_path, tmp_path, "log")
    assert not [word for word in plain if word.split("=")[0] in ("--partition", "--mem", "--time", "--gpus-per-node")]
    assert "--requeue" in plain and "--signal=B:USR1@60" in plain
    block = SlurmExecutor.model_validate(
        {"partition": "a100", "account": "nlp", "qos": "high", "constraint": "a|b", "time": "1-02:00:00", "nodes": 2,
         "cpus": 8, "memory_gb": 64, "gpus": 4, "grace": 90, "requeue": False,
         "sbatch": {"mail-type": "END", "exclusive": ""}}
    )  # fmt: skip
    options = sbatch_options(block, "n", tmp_path / "50%", tmp_path, "a-%a.log")
    for word in (
        "--partition=a100", "--account=nlp", "--qos=high", "--constraint=a|b", "--time=1-02:00:00", "--nodes=2",
        "--cpus-per-task=8", "--mem=64G", "--gpus-per-node=4", "--signal=B:USR1@90", "--no-requeue", "--mail-type=END",
        "--exclusive", f"--output={tmp_path}/50%%/a-%a.log",
    ):  # fmt: skip
        assert word in options


def test_a_script_takes_names_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "it's a $HOME `folder`"
    folder.mkdir()
    script = write_script(folder / "a.sh", "stage\n$(touch hacked)", [str(folder), "a b'c"], "export SAID=$((1 + 1))")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    text = script.read_text()
    fake = bin_ / Path(sys.executable).name
    fake.write_text('#!/bin/bash\nprintf "%s|" "$SAID" "$@"\n')
    fake.chmod(0o755)
    script.write_text(text.replace(f"export PATH={Path(sys.executable).parent}", f"export PATH={bin_}"))
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"2|-m|align.cli.slurm_job|{folder}|a b'c|", done.stderr
    assert not (tmp_path / "hacked").exists()
    gone = tmp_path / "gone"
    gone.mkdir()
    moved_script = (
        write_script(gone / "a.sh", "x", ["a", "b"], None).read_text().replace(str(gone), str(tmp_path / "no"))
    )
    done = subprocess.run(["bash", "-c", moved_script], capture_output=True, text=True)
    assert done.returncode == 1 and "does not see the store's folder" in done.stderr


def test_a_signal_that_comes_before_python_can_hear_it_is_kept(tmp_path: Path) -> None:
    slow = tmp_path / "bin" / Path(sys.executable).name
    slow.parent.mkdir()
    code = (
        "import signal\nfrom align.pipeline.stop_signal import StopRequest\n"
        "with StopRequest().handle_signals(signal.SIGUSR1) as stop: print('heard', stop.is_requested)"
    )
    slow.write_text(f'#!/bin/bash\ntouch begun; sleep 2\nexec {sys.executable} -c "{code}"\n')
    slow.chmod(0o755)
    script = write_script(tmp_path / "a.sh", "x", ["a"], None)
    text = script.read_text().replace(f"export PATH={Path(sys.executable).parent}", f"export PATH={slow.parent}")
    script.write_text(text)
    process = subprocess.Popen(["bash", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=120)[0] == "heard True\n"


def test_nothing_of_the_environment_is_in_scripts_or_records(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "sesame-1234")
    (slurm.state / "held").touch()
    submitted = submit_run(Pipeline(toy.pipeline(), base=slurm.folder), RunOptions(slurm.store))
    for path in submitted.submissions["one"].folder.iterdir():
        assert "sesame-1234" not in path.read_text()
    assert "sesame-1234" not in (slurm.state / "calls").read_text()
