"""Locks that hold between machines over a shared folder, that a dead machine does not keep, and that fence.

A lock is a folder of numbered claims. Making the next number is what takes the lock: ``link`` gives a name to one
asker alone, on NFS too. The holder writes into its claim every few seconds; who waits watches it change. A claim that
stays the same for its lease is lost: its machine died, or cannot reach the folder. A holder on this machine that died
is seen at once. Numbers never come again, so a holder that wakes up after its lock was taken finds a higher one
(`Hold.confirm`), and a path that contains its number is its own for ever.

No clock is compared with another one, and no clock that can be set is read: a waiter counts its own seconds, and only
those between two looks that the folder answered, so that a stopped waiter or an outage counts for nothing. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from align.errors import StageFailed
from align.shared_folder import UNREACHABLE, Patience, forget_cached

CLAIM_BYTES = 1024
"""Claims are written over in place, always whole: on a full disk the holder can still say that it lives."""
FIRST_LOOK, LONGEST_LOOK = 0.1, 2.0
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Lease:
    """``every`` so many seconds a holder shows that it lives; after ``seconds`` without, the lock is another's."""

    seconds: float = 120.0
    every: float = 10.0


class LockLost(StageFailed):
    """Another process took the lock while this one was silent; what this one was making must not be published."""


class Hold:
    """A lock that is held, until `release`. ``number`` is higher than that of any holder before."""

    def __init__(self, folder: Path, number: int, token: str, lease: Lease, after_silence: bool) -> None:
        self.folder, self.number, self.token, self.lease = folder, number, token, lease
        self.after_silence = after_silence
        """Whether the holder before was silent rather than known to have ended: it may wake up."""
        self.lost = ""
        """Who took the lock, in words; empty while it is held."""
        self._beats = 0
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock-{folder.name}", daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Make sure, from the folder itself, that the lock is still held; raises ``LockLost``."""
        with contextlib.suppress(FileNotFoundError):
            forget_cached(self.folder)
        self._look()
        if self.lost:
            raise LockLost(self.lost)

    def check(self) -> None:
        """Raise ``LockLost`` if the last look has found that; costs nothing."""
        if self.lost:
            raise LockLost(self.lost)

    def release(self) -> None:
        """Give the lock back; one that was lost is left to its new holder."""
        self._ended.set()
        with self._writing:
            if not self.lost:
                with contextlib.suppress(FileNotFoundError):  # taken and tidied away since the last look
                    self._write(released=True)

    def _beat(self) -> None:
        while not self._ended.wait(self.lease.every):
            # An error is the folder's, not the lock's: whether it was lost shows when the folder is back.
            with contextlib.suppress(OSError):
                self._look()
                with self._writing:
                    if self.lost:
                        return
                    if not self._ended.is_set():
                        self._write(released=False)

    def _look(self) -> None:
        highest = _highest(self.folder)
        if highest > self.number:
            self.lost = f"the lock was taken by {describe(_read(self.folder / str(highest)))} while this run was silent"
        elif highest < self.number or _parse(_read(self.folder / str(self.number))).get("token") != self.token:
            self.lost = f"the lock's file {self.folder / str(self.number)} is gone"

    def _write(self, released: bool) -> None:
        self._beats += 1
        content = _content(self.token, self.lease, self._beats, released)
        handle = os.open(self.folder / str(self.number), os.O_WRONLY)
        try:
            os.pwrite(handle, content, 0)
            os.fsync(handle)
        finally:
            os.close(handle)


class Lock:
    """The lock in ``folder``, as one who may ask for it sees it. Not for use by several threads at once."""

    def __init__(self, folder: Path, lease: Lease | None = None) -> None:
        self.folder, self.lease = folder, lease or Lease()
        self._seen: tuple[int, bytes] = (0, b"")
        self._silent = 0.0
        self._last: float | None = None
        self._token, self._after_silence = "", False

    def acquire(self, on_wait: Callable[[str], None], patience: Patience) -> Hold:
        """Wait until the lock is this process's; ``on_wait`` is told once who holds it.

        Raises ``StoreUnreachable`` where the folder does not answer for as long as ``patience`` has, else ``OSError``.
        """
        told, pause = False, FIRST_LOOK
        while True:
            hold = patience.keep_trying(self.try_acquire)
            if hold is not None:
                return hold
            if not told:
                on_wait(describe(self._seen[1]))
                told = True
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_LOOK)

    def try_acquire(self) -> Hold | None:
        """The lock, or None while another has it. After an ``OSError`` it may be called again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number, content = self._top()
        if (
            not self._token or _parse(content).get("token") != self._token
        ):  # else an error came after the claim was made
            state = self._judge(number, content)
            if state == "held":
                return None
            number, self._token, self._after_silence = number + 1, uuid.uuid4().hex, state == "silent"
            if not _make_claim(self.folder, number, _content(self._token, self.lease, 0, released=False)):
                return None
        token = self._token
        # Who looked before another had the lock, lost it and tidied up may have made a number that was gone already.
        if _highest(self.folder) != number:
            (self.folder / str(number)).unlink(missing_ok=True)
            return None
        for below in _numbers(self.folder):
            if below < number:
                (self.folder / str(below)).unlink(missing_ok=True)
        self._token = ""
        return Hold(self.folder, number, token, self.lease, self._after_silence)

    def is_held(self) -> bool:
        """Whether a process has the lock, as far as one look can tell: one that fell silent may still be counted."""
        try:
            return self._judge(*self._top()) == "held"
        except FileNotFoundError:
            return False

    def _top(self) -> tuple[int, bytes]:
        try:
            number = _highest(self.folder)
            return (number, _read(self.folder / str(number))) if number else (0, b"")
        except OSError:
            self._last = None  # what could not be seen was no silence
            raise

    def _judge(self, number: int, content: bytes) -> str:
        """``free``, ``dead``, ``silent`` (its lease is over) or ``held``."""
        claim = _parse(content)
        now = time.monotonic()
        if number == 0 or claim.get("released"):
            return "free"
        if _died_here(claim):
            return "dead"
        if (number, content) != self._seen:
            self._seen, self._silent = (number, content), 0.0
        elif self._last is not None:
            self._silent += min(now - self._last, 2 * LONGEST_LOOK)
        self._last = now
        return "silent" if self._silent >= float(claim.get("lease", self.lease.seconds)) else "held"


def describe(content: bytes) -> str:
    """Who made a claim, in words."""
    claim = _parse(content)
    if "pid" not in claim:
        return "another process"
    since = (time.time() - float(claim.get("since", 0))) / 60  # of two clocks: only for people, and only if it can be
    words = f"process {claim['pid']} on {claim.get('host', '?')}"
    return f"{words}, for {since:.0f} min" if 0 <= since < 60 * 24 * 365 else words


def _numbers(folder: Path) -> list[int]:
    return [int(name) for name in os.listdir(folder) if name.isdecimal()]


def _highest(folder: Path) -> int:
    return max(_numbers(folder), default=0)


def _read(path: Path) -> bytes:
    """A claim's bytes: opening a file has NFS ask for its newest state. Empty for one that was just tidied away."""
    try:
        with path.open("rb") as file:
            return file.read(CLAIM_BYTES)
    except FileNotFoundError:
        return b""


def _parse(content: bytes) -> dict[str, Any]:
    """A claim; empty for one that is half-written, which then counts as held by somebody unknown."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _content(token: str, lease: Lease, beats: int, released: bool) -> bytes:
    claim = {
        "token": token, "pid": os.getpid(), "host": socket.gethostname()[:200], "machine": _machine(),
        "started": _started(os.getpid()), "since": round(time.time()), "lease": lease.seconds, "beats": beats,
        "released": released,
    }  # fmt: skip
    return json.dumps(claim).encode("ascii").ljust(CLAIM_BYTES)


def _make_claim(folder: Path, number: int, content: bytes) -> bool:
    """Give the claim its number unless it has been given; complete from its first moment where links exist."""
    target, draft = folder / str(number), folder / f".draft-{uuid.uuid4().hex}"
    try:
        _write_new(draft, content)
        try:
            os.link(draft, target)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno in NO_LINKS:
                return _make_alone(target, content)
            if error.errno not in UNREACHABLE:
                raise
        # The answer to a link may be lost on its way although the link was made: the count of names tells.
        return os.stat(draft).st_nlink == 2
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _make_alone(target: Path, content: bytes) -> bool:
    """For a file system without links: empty at first, which its readers bear."""
    try:
        _write_new(target, content)
    except FileExistsError:
        return False
    return True


def _write_new(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)


@cache
def _machine() -> str:
    """This boot of this kernel, and the process numbers' space; empty where it cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; tells it from a later one of the same number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, fields = stat.rpartition(") ")[2][:1], stat.rpartition(") ")[2].split()
    return "" if state in "ZX" else fields[19]


def _died_here(claim: dict[str, Any]) -> bool:
    """Whether the claim was made on this machine by a process that has ended. Elsewhere nobody can know."""
    if not _machine() or claim.get("machine") != _machine() or not isinstance(claim.get("pid"), int):
        return False
    return _started(claim["pid"]) != claim.get("started")
