"""Locks that hold between machines over a shared place, that a dead machine does not keep, and that fence.

A lock is a place with numbered claims (``claims.py``). Making the next number is what takes the lock: one asker alone
gets it. The holder writes into its claim every few seconds; who waits watches it change. A claim that
stays the same for its lease is lost: its machine died, or cannot reach the folder. A holder on this machine that died
is seen at once. Numbers never come again, so a holder that wakes up after its lock was taken finds a higher one
(`Hold.confirm`), and a path that contains its number is its own for ever.

No clock is compared with another one, and no clock that can be set is read: a waiter counts its own seconds, and only
those between two looks that the folder answered, so that a stopped waiter or an outage counts for nothing. No torch.
"""

from __future__ import annotations

import contextlib
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

from align.errors import StageFailed, UserError
from align.store.claims import CLAIM_BYTES, Claims, FolderClaims
from align.store.retry import Patience

FIRST_LOOK, LONGEST_LOOK = 0.1, 2.0


@dataclass(frozen=True)
class Lease:
    """``every`` so many seconds a holder shows that it lives; after ``seconds`` without, the lock is another's."""

    seconds: float = 120.0
    every: float = 10.0


class LockLost(StageFailed):
    """Another process took the lock while this one was silent; what this one was making must not be published."""


class Hold:
    """A lock that is held, until `release`. ``number`` is higher than that of any holder before."""

    def __init__(
        self, claims: Claims, number: int, token: str, lease: Lease, since: float, after_silence: bool
    ) -> None:
        self.claims, self.number, self.token, self.lease = claims, number, token, lease
        self.since = since
        self.after_silence = after_silence
        """Whether the holder before was silent rather than known to have ended: it may wake up."""
        self.lost = ""
        """Who took the lock, in words; empty while it is held."""
        self._beats = 0
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock-{number}", daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Make sure, from the claims themselves, that the lock is still held; raises ``LockLost``."""
        self.claims.look_anew()
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
            with contextlib.suppress(OSError, UserError):
                self._look()
                with self._writing:
                    if self.lost:
                        return
                    if not self._ended.is_set():
                        self._write(released=False)

    def _look(self) -> None:
        highest = max(self.claims.numbers(), default=0)
        if highest > self.number:
            self.lost = f"the lock was taken by {describe(self.claims.read(highest))} while this run was silent"
        elif highest < self.number or _parse(self.claims.read(self.number)).get("token") != self.token:
            self.lost = f"the lock's file {self.claims.describe(self.number)} is gone"

    def _write(self, released: bool) -> None:
        self._beats += 1
        self.claims.write(self.number, _content(self.token, self.lease, self.since, self._beats, released))


class Lock:
    """The lock at a place, as one who may ask for it sees it. Not for use by several threads at once."""

    def __init__(self, place: Path | Claims, lease: Lease | None = None) -> None:
        self.claims: Claims = FolderClaims(place) if isinstance(place, Path) else place
        self.lease = lease or Lease()
        self._seen: tuple[int, bytes] = (0, b"")
        self._silent = 0.0
        self._last: float | None = None
        self._token, self._since, self._after_silence = "", 0.0, False

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
        self.claims.prepare()
        number, content = self._top()
        if (
            not self._token or _parse(content).get("token") != self._token
        ):  # else an error came after the claim was made
            state = self._judge(number, content)
            if state == "held":
                return None
            number, self._token, self._after_silence = number + 1, uuid.uuid4().hex, state == "silent"
            self._since = time.time()
            if not self.claims.make(number, _content(self._token, self.lease, self._since, 0, released=False)):
                return None
        token = self._token
        # Who looked before another had the lock, lost it and tidied up may have made a number that was gone already.
        made = self.claims.numbers()
        if max(made, default=0) != number:
            self.claims.drop(number)
            return None
        for below in made:
            if below < number:
                self.claims.drop(below)
        self._token = ""
        return Hold(self.claims, number, token, self.lease, self._since, self._after_silence)

    def holder_lives(self, patience: Patience) -> bool:
        """Whether the lock stays with who has it: looks until the holder shows that it lives, or could be taken over.

        That takes no time for a holder on this machine, ``Lease.every`` seconds for one elsewhere that lives, and the
        lease for one that is dead there. Raises as ``acquire``.
        """
        first = top = patience.keep_trying(self._top)
        while self._judge(*top) == "held":
            if top != first or _is_of_this_machine(_parse(top[1])):
                return True
            time.sleep(LONGEST_LOOK)
            top = patience.keep_trying(self._top)
        return False

    def is_held(self) -> bool:
        """Whether a process has the lock, as far as one look can tell: one that fell silent may still be counted."""
        try:
            return self._judge(*self._top()) == "held"
        except FileNotFoundError:
            return False

    def holder(self) -> dict[str, Any] | None:
        """``pid``, ``host`` and more of who holds the lock, by its own claim; None while nobody does."""
        try:
            number, content = self._top()
        except FileNotFoundError:
            return None
        claim = _parse(content)
        return claim if claim.get("pid") and self._judge(number, content) == "held" else None

    def _top(self) -> tuple[int, bytes]:
        try:
            number = max(self.claims.numbers(), default=0)
            return (number, self.claims.read(number)) if number else (0, b"")
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


FIELDS: dict[str, tuple[type, ...]] = {
    "token": (str,), "pid": (int,), "host": (str,), "machine": (str,), "started": (str,), "since": (int, float),
    "lease": (int, float), "beats": (int,), "released": (bool,),
}  # fmt: skip
"""Types of what a claim says."""


def _parse(content: bytes) -> dict[str, Any]:
    """A claim; empty for one that is half-written or damaged, which then counts as held by somebody unknown."""
    try:
        claim = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(claim, dict):
        return {}
    is_whole = all(isinstance(claim[name], types) for name, types in FIELDS.items() if name in claim)
    return claim if is_whole else {}


def _content(token: str, lease: Lease, since: float, beats: int, released: bool) -> bytes:
    claim = {
        "token": token, "pid": os.getpid(), "host": socket.gethostname()[:200], "machine": _machine(),
        "started": _started(os.getpid()), "since": since, "lease": lease.seconds, "beats": beats,
        "released": released,
    }  # fmt: skip
    return json.dumps(claim).encode("ascii").ljust(CLAIM_BYTES)


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
    return _is_of_this_machine(claim) and _started(claim["pid"]) != claim.get("started")


def _is_of_this_machine(claim: dict[str, Any]) -> bool:
    return bool(_machine()) and claim.get("machine") == _machine() and isinstance(claim.get("pid"), int)
