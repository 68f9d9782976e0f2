"""All calls to Slurm (sbatch, squeue, sacct, scancel, scontrol, sinfo), and the checks before a submission.

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

from align.clusters.follow import SchedulerError
from align.config.runtime.executor import SlurmExecutor
from align.config.validation import suggest
from align.errors import UserError

TIMEOUT = 60.0
TRIES = 3
PAUSE = 2.0
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
"""State of a job that is over without success → its description."""


@dataclass(frozen=True)
class Job:
    """A job as Slurm sees it: its state, its reason for waiting, the nodes that it runs on."""

    number: int
    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def waits(self) -> bool:
        """True when it has yet to start, or to start again."""
        return self.state in WAITING

    @property
    def is_live(self) -> bool:
        """True when it waits or runs."""
        return self.waits or self.state in RUNNING


def require_slurm() -> None:
    """Raise ``UserError`` if Slurm's commands are not installed."""
    missing = [name for name in ("sbatch", "squeue", "scancel", "scontrol", "sinfo") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"executor slurm: there is no {missing[0]} here. Run this on a login node of the cluster, or with --on "
            "local."
        )


def run_command(command: Sequence[str], tries: int = TRIES) -> str:
    """Return the output of a Slurm command. Raises ``SchedulerError`` with its message once ``tries`` are used up."""
    message = ""
    # A controller under load misses a call now and then.
    for tries_left in reversed(range(tries)):
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            message = f"no answer within {TIMEOUT:.0f} s"
        except OSError as error:
            raise SchedulerError(f"{command[0]}: {error.strerror}") from None
        else:
            if process.returncode == 0:
                return process.stdout
            message = (process.stderr or process.stdout).strip() or f"exit code {process.returncode}"
        if tries_left:
            time.sleep(PAUSE)
    raise SchedulerError(f"{command[0]}: {message}")


def check(options: Sequence[str], script: Path) -> None:
    """Raise ``SchedulerError`` with Slurm's reason if it would refuse this job."""
    run_command(["sbatch", "--test-only", *options, str(script)], tries=1)


def submit(options: Sequence[str], script: Path) -> int:
    """Submit a job and return its number. There is only one try, because a second try could submit the job twice."""
    answer = run_command(["sbatch", "--parsable", *options, str(script)], tries=1)
    try:
        # The answer is NUMBER, or NUMBER;CLUSTER.
        return int(answer.strip().splitlines()[-1].partition(";")[0])
    except (ValueError, IndexError):
        raise SchedulerError(f"sbatch: no number of a job in its answer {answer!r}") from None


def jobs(numbers: Collection[int], all_users: bool = False) -> dict[int, Job]:
    """Return number → job; a job that Slurm has forgotten is missing. For an array: the task that is most alive.

    Only this user's jobs are listed, unless ``all_users``.
    """
    if not numbers:
        return {}
    requested = set(numbers)
    queued: dict[int, Job] = {}
    owner = [] if all_users else ["--me"]
    lines = run_command(["squeue", "--noheader", *owner, "--states=all", "--array", "--format=%F|%T|%r|%N"])
    for line in lines.splitlines():
        number, state, reason, nodes = [*line.strip().split("|"), "", "", ""][:4]
        if number.isdigit() and int(number) in requested:
            job = Job(int(number), state, "" if reason == "None" else reason, nodes)
            other = queued.get(job.number)
            # Tasks of an array share the number. Running tasks count first, then waiting tasks, then ended tasks.
            if other is None or (job.is_live and (other.waits or not other.is_live)):
                queued[job.number] = job
    # Slurm forgets ended jobs after some minutes (MinJobAge); accounting, if there is any, does not.
    return _past_jobs(requested - queued.keys()) | queued


def _past_jobs(numbers: Collection[int]) -> dict[int, Job]:
    """Return the jobs that only Slurm's accounting still knows, if there is any."""
    if not numbers:
        return {}
    option = f"--jobs={','.join(map(str, sorted(numbers)))}"
    command = ["sacct", "--noheader", "--allocations", "--parsable2", option, "--format=JobID,State"]
    try:
        answer = run_command(command, tries=1)
    except SchedulerError:
        # No accounting here. The jobs count as gone, and the store tells whether they succeeded.
        return {}
    past: dict[int, Job] = {}
    for line in answer.splitlines():
        name, _, state = line.partition("|")
        number = re.match(r"\d+", name)  # "12_3" is a task of an array
        if number and state:  # "CANCELLED by 1000" has more words than the state
            past.setdefault(int(number[0]), Job(int(number[0]), state.split()[0].rstrip("+")))
    return past


def cancel(numbers: Collection[int]) -> None:
    """Cancel jobs, waiting or running."""
    if numbers:
        run_command(["scancel", *map(str, sorted(numbers))])


def requeue(number: str) -> None:
    """Requeue a running job; Slurm then ends its processes."""
    run_command(["scontrol", "requeue", number])


def state_of(number: str) -> str:
    """Return the state of one job; empty if Slurm does not know it."""
    try:
        return run_command(["squeue", "--noheader", f"--jobs={number}", "--states=all", "--format=%T"]).strip()
    except SchedulerError:
        return ""


def partitions() -> list[str]:
    """Return the names of all partitions."""
    answer = run_command(["sinfo", "--all", "--noheader", "--format=%R"])
    return list(dict.fromkeys(line.strip() for line in answer.splitlines() if line.strip()))


def is_this_machine_alone(partition: str | None) -> bool:
    """Return True when the partition, or for None the cluster, has no node but this machine."""
    selection = "--all" if partition is None else f"--partition={partition}"  # together they are refused
    answer = run_command(["sinfo", "--noheader", "--Node", selection, "--format=%n"])
    # Short names: one side may have the domain, the other not.
    hosts = {line.strip().partition(".")[0] for line in answer.splitlines() if line.strip()}
    return hosts <= {socket.gethostname().partition(".")[0]}


LOCAL = frozenset(
    (
        *("bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs"),
        *("rootfs", "squashfs", "tmpfs", "vfat", "xfs", "zfs"),
    )
)
"""File systems of a single machine, unless it serves them to others."""
ESCAPED = re.compile(r"\\(040|011|012|134)")
"""Characters that Linux escapes in a mount point: space, tab, line break, backslash."""


def check_cluster(blocks: dict[str, SlurmExecutor], store: Path, where: str) -> None:
    """Raise ``UserError`` for settings that no job could use. ``blocks`` maps a place in the YAML to its settings."""
    require_slurm()
    try:
        # An unknown partition would fail in sbatch as well, but without the nearest name.
        names = partitions()
        for place, block in blocks.items():
            # For sbatch, ``gpu,cpu`` is whichever of the two starts the job first.
            for partition in [] if block.partition is None else block.partition.split(","):
                if partition not in names:
                    raise UserError(
                        f"{where}: {place}.partition: there is no partition '{partition}' in this cluster."
                        f"{suggest(partition, names)}"
                    )
        for block in blocks.values():
            _check_store(block, store)
    except SchedulerError as error:
        raise UserError(f"executor slurm: Slurm does not answer ({error}). Nothing was submitted.") from None


def _check_store(block: SlurmExecutor, store: Path) -> None:
    kind = file_system(store)
    # A store on a local disk is fine if the only node is this machine.
    if block.shared_store or kind not in LOCAL or is_this_machine_alone(block.partition):
        return
    nodes = "the cluster" if block.partition is None else f"partition {block.partition}"
    raise UserError(
        f"{store}: the store is on a local file system ({kind}), which the nodes of {nodes} do not see. Name a folder "
        "on a shared one with --store or runtime.store; if nodes do see it, say `runtime: {executor: {name: slurm, "
        "shared_store: true}}`."
    )


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the type of the file system that holds ``path``, as Linux calls it; empty if it does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    # A path is on the file system with the longest mount point above it.
    longest = -1
    kind = ""
    resolved = path.resolve()
    for line in lines:
        words = line.split(" ")
        if len(words) < 3:
            continue
        point = ESCAPED.sub(lambda match: chr(int(match[1], 8)), words[1])
        if resolved.is_relative_to(point) and len(point) >= longest:  # of two mounts at one point the later is on top
            longest = len(point)
            kind = words[2]
    return kind
