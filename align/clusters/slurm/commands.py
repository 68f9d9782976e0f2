"""The one place that speaks to Slurm: sbatch, squeue, sacct, scancel, scontrol, sinfo.

Every call ends within ``TIMEOUT`` seconds. A controller that does not answer for a moment is asked again. Never imports
torch.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.clusters.follow import NoAnswer
from align.errors import UserError

TIMEOUT = 60.0
TRIES, PAUSE = 3, 2.0
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
OVER = {
    "FAILED": "its job failed",
    "TIMEOUT": "its job reached the time limit",
    "OUT_OF_MEMORY": "its job ran out of memory",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "CANCELLED": "its job was cancelled",
    "PREEMPTED": "its job was preempted and not queued again",
    "DEADLINE": "its job reached its deadline",
    "REVOKED": "its job was revoked",
}
"""States of jobs that are over without having done their work, in words."""


@dataclass(frozen=True)
class Job:
    """A job as Slurm sees it; ``state`` is Slurm's word, ``why`` its reason for waiting, ``nodes`` where it runs."""

    number: int
    state: str
    why: str = ""
    nodes: str = ""

    @property
    def waits(self) -> bool:
        """Whether it has yet to start, or to start again."""
        return self.state in WAITING

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs."""
        return self.waits or self.state in RUNNING


def require_slurm() -> None:
    """Raise ``UserError`` where Slurm's commands are not installed."""
    missing = [name for name in ("sbatch", "squeue", "scancel", "scontrol", "sinfo") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"--on slurm: there is no {missing[0]} here. Run this on a login node of the cluster, or without --on."
        )


def ask(command: Sequence[str], tries: int = TRIES) -> str:
    """What a command of Slurm answers; raises ``NoAnswer`` with its message once ``tries`` are used up."""
    said = ""
    for left in reversed(range(tries)):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            said = f"no answer within {TIMEOUT:.0f} s"
        except OSError as error:
            raise NoAnswer(f"{command[0]}: {error.strerror}") from None
        else:
            if done.returncode == 0:
                return done.stdout
            said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        if left:
            time.sleep(PAUSE)
    raise NoAnswer(f"{command[0]}: {said}")


def check(options: Sequence[str], script: Path) -> None:
    """Ask whether Slurm would take this job; raises ``NoAnswer`` with what it says against it."""
    ask(["sbatch", "--test-only", *options, str(script)], tries=1)


def submit(options: Sequence[str], script: Path) -> int:
    """Hand a job in; its number. Tried once: a second try could hand it in twice."""
    said = ask(["sbatch", "--parsable", *options, str(script)], tries=1)
    try:
        return int(said.strip().splitlines()[-1].partition(";")[0])
    except (ValueError, IndexError):
        raise NoAnswer(f"sbatch: no number of a job in its answer {said!r}") from None


def jobs(numbers: Collection[int], everybodys: bool = False) -> dict[int, Job]:
    """State of these jobs by Slurm; one that it has forgotten is missing. For an array: any task that is live.

    They are this user's, unless ``everybodys``.
    """
    if not numbers:
        return {}
    wanted = set(numbers)
    found: dict[int, Job] = {}
    whose = [] if everybodys else ["--me"]
    queue = ask(["squeue", "--noheader", *whose, "--states=all", "--array", "--format=%F|%T|%r|%N"])
    for line in queue.splitlines():
        number, state, why, nodes = [*line.strip().split("|"), "", "", ""][:4]
        if number.isdigit() and int(number) in wanted:
            job = Job(int(number), state, "" if why == "None" else why, nodes)
            known = found.get(job.number)
            if known is None or (job.is_live and (known.waits or not known.is_live)):
                found[job.number] = job
    return _past(wanted - found.keys()) | found


def _past(numbers: Collection[int]) -> dict[int, Job]:
    """Jobs that only Slurm's accounting still knows, where there is one."""
    if not numbers:
        return {}
    words = f"--jobs={','.join(map(str, sorted(numbers)))}"
    try:
        answer = ask(["sacct", "--noheader", "--allocations", "--parsable2", words, "--format=JobID,State"], 1)
    except NoAnswer:
        return {}
    past: dict[int, Job] = {}
    for line in answer.splitlines():
        name, _, state = line.partition("|")
        number = re.match(r"\d+", name)  # "12_3" is a task of an array
        if number and state:  # "CANCELLED by 1000" has more words than the state
            past.setdefault(int(number[0]), Job(int(number[0]), state.split()[0].rstrip("+")))
    return past


def cancel(numbers: Collection[int]) -> None:
    """End jobs, whether they wait or run."""
    if numbers:
        ask(["scancel", *map(str, sorted(numbers))])


def requeue(number: str) -> None:
    """Queue a running job again; Slurm then ends its processes."""
    ask(["scontrol", "requeue", number])


def state_of(number: str) -> str:
    """The state of one job, empty where Slurm does not say."""
    try:
        return ask(["squeue", "--noheader", f"--jobs={number}", "--states=all", "--format=%T"]).strip()
    except NoAnswer:
        return ""


def partitions() -> list[str]:
    """Names of all partitions."""
    said = ask(["sinfo", "--all", "--noheader", "--format=%R"])
    return list(dict.fromkeys(line.strip() for line in said.splitlines() if line.strip()))


def is_this_machine_alone(partition: str | None) -> bool:
    """Whether the partition, or where None is given the cluster, has no node but this machine."""
    chosen = "--all" if partition is None else f"--partition={partition}"  # together they are refused
    said = ask(["sinfo", "--noheader", "--Node", chosen, "--format=%n"])
    hosts = {line.strip().partition(".")[0] for line in said.splitlines() if line.strip()}
    return hosts <= {socket.gethostname().partition(".")[0]}
