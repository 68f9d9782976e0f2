"""Locks that other machines hold, lose and get back. Another machine is a process that says it runs elsewhere."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.store import claims, locks
from align.store.claims import FolderClaims
from align.store.locks import Lease, Lock, describe
from align.store.retry import Retry
from tests.support.refusals import Refused

SHORT = Lease(seconds=1.0, every=0.1)
ELSEWHERE = """
import sys, time
from pathlib import Path
from align.store import locks
from align.store.retry import Retry
locks._machine = lambda: "another machine"
folder = Path(sys.argv[1])
hold = locks.Lock(folder, locks.Lease(float(sys.argv[2]), 0.1)).acquire(lambda holder: None, Retry(folder))
print("held", flush=True)
sys.stdin.readline()
try:
    hold.confirm()
    print("still held", flush=True)
except locks.LockLost as lost:
    print(lost, flush=True)
hold.release()
"""


class Holder:
    """A process that holds the lock in ``folder`` as another machine would."""

    def __init__(self, folder: Path, lease: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", ELSEWHERE, str(folder), str(lease)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        assert self.line() == "held"

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def confirms(self) -> str:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.line()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "sft-0123"


@pytest.fixture
def elsewhere(folder: Path) -> Iterator[Callable[[float], Holder]]:
    rows = []

    def start(lease: float) -> Holder:
        rows.append(Holder(folder, lease))
        return rows[-1]

    yield start
    for holder in rows:
        holder.process.kill()
        holder.process.communicate()


def take(lock: Lock) -> locks.Hold:
    return lock.acquire(lambda holder: None, Retry(Path(), 5))


def claim_of_elsewhere(folder: Path, number: int = 1, **changes: object) -> Path:
    """A claim whose holder will never be heard of again."""
    folder.mkdir(parents=True, exist_ok=True)
    claim = {"token": "x", "pid": 7, "host": "far", "machine": "elsewhere", "started": "1", "lease": 1.0, "beats": 3}
    (folder / str(number)).write_bytes(json.dumps({**claim, **changes}).encode().ljust(claims.CLAIM_BYTES))
    return folder / str(number)


def test_one_holds_it_at_a_time_and_numbers_grow(folder: Path) -> None:
    first = take(Lock(folder))
    assert Lock(folder).try_acquire() is None
    assert Lock(folder).is_held()
    first.confirm()
    first.release()
    assert not Lock(folder).is_held()
    second = take(Lock(folder))
    assert second.number == first.number + 1
    assert not second.after_silence
    assert [path.name for path in folder.iterdir()] == ["2"]
    second.release()


def test_processes_never_hold_it_together(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom align.store.locks import Lock\n"
        "from align.store.retry import Retry\n"
        "folder, count = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "for _ in range(10):\n"
        "    hold = Lock(folder).acquire(lambda holder: None, Retry(folder))\n"
        "    value = int(count.read_text())\n    time.sleep(0.002)\n    count.write_text(str(value + 1))\n"
        "    hold.release()\n"
    )
    count = tmp_path / "count"
    count.write_text("0")
    command = [sys.executable, "-c", script, str(folder), str(count)]
    running = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()}) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert count.read_text() == "30"


def test_a_holder_of_this_machine_that_was_killed_keeps_nothing(folder: Path) -> None:
    script = ELSEWHERE.replace('locks._machine = lambda: "another machine"', "")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), "1000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    assert Lock(folder).try_acquire() is None
    process.kill()
    while Lock(folder).is_held():  # killing takes a moment; nobody has waited for the process yet
        time.sleep(0.01)
    hold = Lock(folder).try_acquire()
    assert hold is not None
    assert not hold.after_silence
    hold.release()
    process.communicate()


def test_a_machine_that_died_keeps_it_for_its_lease(folder: Path) -> None:
    claim_of_elsewhere(folder)
    lock, message = Lock(folder, SHORT), []
    began = time.monotonic()
    assert lock.try_acquire() is None
    hold = lock.acquire(message.append, Retry(folder))
    assert time.monotonic() - began >= 1.0
    assert message == ["process 7 on far"]
    assert hold.after_silence
    hold.release()


def test_whether_a_holder_lives_is_found_by_watching(folder: Path, elsewhere: Callable[[float], Holder]) -> None:
    patience = Retry(Path(), 5)
    here = take(Lock(folder))
    began = time.monotonic()
    assert Lock(folder).holder_lives(patience)
    assert time.monotonic() - began < 1, "a process of this machine is looked up"
    here.release()
    assert not Lock(folder).holder_lives(patience)
    holder = elsewhere(1.0)
    assert Lock(folder).holder_lives(patience)
    holder.process.kill()
    assert not Lock(folder).holder_lives(patience)


def test_a_machine_that_comes_back_finds_its_lock_taken(folder: Path, elsewhere: Callable[[float], Holder]) -> None:
    holder = elsewhere(1.0)
    lock, end = Lock(folder, SHORT), time.monotonic() + 2.0
    while time.monotonic() < end:  # it lives, so it keeps it beyond its lease
        assert lock.try_acquire() is None
        time.sleep(0.1)
    holder.process.send_signal(signal.SIGSTOP)
    hold = take(lock)
    assert hold.after_silence
    holder.process.send_signal(signal.SIGCONT)
    assert f"taken by process {os.getpid()} on" in holder.confirms()
    assert holder.process.wait(20) == 0
    hold.confirm()  # what the other released was not this one's
    assert Lock(folder).is_held()
    hold.release()


def test_a_machine_that_slept_less_than_its_lease_goes_on(folder: Path, elsewhere: Callable[[float], Holder]) -> None:
    holder = elsewhere(60.0)
    holder.process.send_signal(signal.SIGSTOP)
    lock = Lock(folder, SHORT)
    assert [lock.try_acquire() for _ in range(3)] == [None] * 3
    holder.process.send_signal(signal.SIGCONT)
    assert holder.confirms() == "still held"


@pytest.mark.parametrize("jump", [10.0**9, -(10.0**9)])
def test_a_wall_clock_that_jumps_neither_gives_nor_blocks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    hold, waiter = take(Lock(folder, SHORT)), Lock(folder, SHORT)
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    for look in range(15):
        offset[0] = jump * (look >= 5)
        assert waiter.try_acquire() is None
        time.sleep(0.1)
    assert "min" not in describe((folder / "1").read_bytes())  # rather than a nonsense
    hold.release()
    claim_of_elsewhere(folder, 2, since=real())
    offset[0] = 0.0
    assert waiter.try_acquire() is None
    offset[0] = jump
    end = time.monotonic() + 30
    while (hold := waiter.try_acquire()) is None:
        assert time.monotonic() < end, "it is never given"
        time.sleep(0.1)
    assert hold.after_silence
    hold.release()


def test_stopped_waiter_counts_no_unwatched_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim_of_elsewhere(folder, lease=60.0)
    now = [0.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    lock = Lock(folder)
    for _ in range(5):  # five nights on a closed laptop
        assert lock.try_acquire() is None
        now[0] += 30_000.0
    for _ in range(60):
        if (hold := lock.try_acquire()) is not None:
            break
        now[0] += 2.0
    assert hold is not None
    hold.release()


def test_time_in_which_the_folder_did_not_answer_is_no_silence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim_of_elsewhere(folder, lease=3.0)
    now = [0.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    lock, look = Lock(folder), FolderClaims.numbers

    def away(_: FolderClaims) -> list[int]:
        raise OSError(errno.ESTALE, "Stale file handle")

    assert lock.try_acquire() is None
    for _ in range(5):
        now[0] += 1.0
        with monkeypatch.context() as patched, pytest.raises(OSError, match="Stale"):
            patched.setattr(FolderClaims, "numbers", away)
            lock.try_acquire()
        assert FolderClaims.numbers is look
        now[0] += 1.0
        assert lock.try_acquire() is None


def test_of_many_that_find_it_lost_one_gets_it(folder: Path) -> None:
    claim_of_elsewhere(folder, lease=0.2)
    barrier, won = threading.Barrier(8), []

    def ask() -> None:
        lock = Lock(folder, SHORT)
        lock.try_acquire()
        time.sleep(0.3)
        barrier.wait()
        hold = lock.try_acquire()
        if hold is not None:
            won.append(hold)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [hold.number for hold in won] == [2]
    won[0].confirm()
    won[0].release()


def test_who_looked_long_ago_takes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim_of_elsewhere(folder, 1, released=True)
    late, observations = Lock(folder), Lock(folder)._highest()
    for _ in range(2):
        take(Lock(folder)).release()
    holder = take(Lock(folder))
    assert [path.name for path in folder.iterdir()] == ["4"]
    with monkeypatch.context() as patched:
        patched.setattr(
            late, "_highest", lambda: observations
        )  # it goes on from what it saw then, and number 2 is free again
        assert late.try_acquire() is None
    holder.confirm()
    assert [path.name for path in folder.iterdir()] == ["4"]
    holder.release()


@pytest.mark.parametrize("error", [errno.ETIMEDOUT, errno.EIO, errno.EEXIST])
def test_a_link_whose_answer_was_lost_still_counts(folder: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    link = os.link

    def lossy(source: Path, target: Path) -> None:
        link(source, target)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", lossy)
    hold = Lock(folder).try_acquire()
    assert hold is not None
    hold.confirm()
    hold.release()


def test_without_links_a_claim_is_still_one_askers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    hold = take(Lock(folder))
    assert Lock(folder).try_acquire() is None
    assert not claims._create_without_link(folder / "1", b"{}")
    hold.release()
    take(Lock(folder)).release()


def test_an_error_after_the_claim_does_not_leave_it_to_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, failed = FolderClaims.numbers, []

    def away_once(where: FolderClaims) -> list[int]:
        if (where.folder / "1").exists() and not failed:
            failed.append(True)
            raise OSError(errno.EIO, "Input/output error")
        return numbers(where)

    monkeypatch.setattr(FolderClaims, "numbers", away_once)
    hold = take(Lock(folder))
    assert failed
    assert hold.number == 1
    hold.release()


def test_half_written_claim_is_held_until_its_lease_ends(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "1").write_bytes(b"")
    lock = Lock(folder, Lease(0.5, 0.1))
    assert lock.try_acquire() is None
    assert describe(b"") == "another process"
    assert take(lock).after_silence


def test_a_lock_whose_files_were_deleted_is_lost(refused: Refused, folder: Path) -> None:
    hold = take(Lock(folder))
    (folder / "1").unlink()
    refused(hold.confirm)
    hold.release()
