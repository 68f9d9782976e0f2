"""Locks between machines over a shared folder or bucket. A dead machine does not keep them, and they fence.

A lock is a place with numbered claims (``claims.py``). Creating the next number acquires the lock, and only one process
can create it. The holder rewrites its claim every few seconds; a waiter watches it change. A claim that stays the same
for its lease is lost: its machine died, or cannot reach the folder. A holder on this machine that died is seen at once.
Numbers are never used again. So a holder that wakes up after another process acquired its lock finds a higher number
(`Hold.confirm`), and a path that contains its number is its own for ever.

No clocks of two machines are compared, and no clock that can be set is read. A waiter counts its own seconds, and only
those between two looks that the folder answered, so neither a stopped waiter nor an outage counts. No torch.
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
from align.store.retry import Retry

FIRST_LOOK = 0.1
LONGEST_LOOK = 2.0
"""Seconds between a waiter's looks: at first, and at most."""


@dataclass(frozen=True)
class Lease:
    """Times of a lock: a holder rewrites its claim every ``every`` seconds, and loses it after ``seconds`` without."""

    seconds: float = 120.0
    every: float = 10.0


class LockLost(StageFailed):
    """Another process took the lock while this process was silent; what this process made must not be published."""


@dataclass(frozen=True)
class _Claim:
    """The claim by which a process acquires a lock."""

    number: int
    token: str
    """Random, so a process knows its own claim after an error."""
    since: float
    """Wall-clock time, for messages only."""
    after_silence: bool
    """True when the holder before was silent rather than known to have ended: it may wake up."""

    def content(self, lease: Lease, beats: int, released: bool) -> bytes:
        """Return the bytes of the claim; ``beats`` makes them differ from the bytes before."""
        fields = {
            "token": self.token,
            "pid": os.getpid(),
            "host": socket.gethostname()[:200],
            # A waiter on this machine tells by these two that the holder died, even if its pid is in use again.
            "machine": _machine(),
            "started": _start_time(os.getpid()),
            "since": self.since,
            "lease": lease.seconds,
            "beats": beats,
            "released": released,
        }
        # Pad to one length: a rewrite in place must not leave old content behind its end.
        return json.dumps(fields).encode("ascii").ljust(CLAIM_BYTES)


class Hold:
    """A lock that is held, until `release`. ``number`` is higher than any earlier holder's."""

    def __init__(self, claims: Claims, claim: _Claim, lease: Lease) -> None:
        self.claims = claims
        self.lease = lease
        self.number = claim.number
        self.after_silence = claim.after_silence
        self.lost = ""
        """Reason for the loss of the lock; empty while it is held."""
        self._claim = claim
        self._beats = 0
        self._write_lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name=f"lock-{self.number}", daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Read the claims, and raise ``LockLost`` unless the lock is still held."""
        self.claims.refresh()
        self._look()
        self.check()

    def check(self) -> None:
        """Raise ``LockLost`` if the lock was found lost before; reads nothing."""
        if self.lost:
            raise LockLost(self.lost)

    def release(self) -> None:
        """Release the lock; a lost lock is left to its new holder."""
        self._ended.set()
        with self._write_lock:
            if not self.lost:
                with contextlib.suppress(FileNotFoundError):  # a new holder has deleted it since the last look
                    self._write(released=True)

    def _keep_alive(self) -> None:
        """Rewrite the claim every few seconds, in a thread, until the lock is released or lost."""
        while not self._ended.wait(self.lease.every):
            # An error is the folder's, not the lock's: whether the lock was lost shows when the folder is back.
            with contextlib.suppress(OSError, UserError):
                # 1. Look first: a claim must not be written over after another process has acquired the lock.
                self._look()
                # 2. Write, unless ``release`` has written the last word meanwhile.
                with self._write_lock:
                    if self.lost:
                        return
                    if not self._ended.is_set():
                        self._write(released=False)

    def _look(self) -> None:
        """Find out whether another process has acquired the lock, or the claim is gone."""
        highest = max(self.claims.numbers(), default=0)
        if highest > self.number:
            self.lost = f"the lock was taken by {describe(self.claims.read(highest))} while this run was silent"
        # Somebody deleted the files. Numbers may have begun anew since, so ours is another process's claim.
        elif highest < self.number or _parse(self.claims.read(self.number)).get("token") != self._claim.token:
            self.lost = f"the lock's file {self.claims.describe(self.number)} is gone"

    def _write(self, released: bool) -> None:
        self._beats += 1
        self.claims.write(self.number, self._claim.content(self.lease, self._beats, released))


class Lock:
    """The lock at a place, as seen by a process that may acquire it. Not for several threads at once."""

    def __init__(self, place: Path | Claims, lease: Lease | None = None) -> None:
        self.claims: Claims = FolderClaims(place) if isinstance(place, Path) else place
        self.lease = lease or Lease()
        self._last_seen: tuple[int, bytes] = (0, b"")
        """Number and content of the highest claim at the last look."""
        self._silence = 0.0
        """Seconds for which it has stayed the same."""
        self._last_look: float | None = None
        """Monotonic time of the last look that the folder answered."""
        self._pending: _Claim | None = None
        """A claim that may have been created, although an error came instead of the answer."""

    def acquire(self, log: Callable[[str], None], retry: Retry) -> Hold:
        """Wait until this process holds the lock; ``log`` is called once with the holder that it waits for.

        Raises ``StoreUnreachable`` if the folder does not answer for as long as ``retry`` tries, else ``OSError``.
        """
        has_logged = False
        pause = FIRST_LOOK
        while True:
            hold = retry.call(self.try_acquire)
            if hold is not None:
                return hold
            if not has_logged:
                log(describe(self._last_seen[1]))
                has_logged = True
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_LOOK)

    def try_acquire(self) -> Hold | None:
        """Return the lock, or None while another process has it. After an ``OSError`` it may be called again."""
        self.claims.prepare()
        # 1. Judge the highest claim. It may be our own, if its creation was answered with an error.
        number, content = self._highest()
        if self._pending is None or _parse(content).get("token") != self._pending.token:
            state = self._judge(number, content)
            if state == "held":
                return None
            # 2. Create the next number. Of several processes that try, one succeeds.
            self._pending = _Claim(number + 1, uuid.uuid4().hex, time.time(), after_silence=state == "silent")
            created = self.claims.create(number + 1, self._pending.content(self.lease, 0, released=False))
            if not created:
                return None
        claim = self._pending
        # 3. Check that no higher number is there. A process that judged an old claim may have created a number that
        #    another process had already used, given up and tidied away; the successor of that process is higher.
        numbers = self.claims.numbers()
        if max(numbers, default=0) != claim.number:
            self.claims.delete(claim.number)
            return None
        # 4. The lock is ours. Lower claims are of no use any more.
        for lower in numbers:
            if lower < claim.number:
                self.claims.delete(lower)
        self._pending = None
        return Hold(self.claims, claim, self.lease)

    def holder_lives(self, retry: Retry) -> bool:
        """Watch the holder until it shows that it lives (True), or until the lock can be acquired (False).

        The answer is immediate for a holder on this machine. For a holder elsewhere it needs ``Lease.every`` seconds if
        the holder lives, and the lease's seconds if the holder is dead. Raises as ``acquire``.
        """
        first = highest = retry.call(self._highest)
        while self._judge(*highest) == "held":
            # On this machine a holder that counts as held is known to run. Elsewhere its next beat shows that it lives.
            if highest != first or is_of_this_machine(_parse(highest[1])):
                return True
            time.sleep(LONGEST_LOOK)
            highest = retry.call(self._highest)
        return False

    def is_held(self) -> bool:
        """Return True when a process has the lock, by one look: a holder that has just fallen silent still counts."""
        try:
            return self._judge(*self._highest()) == "held"
        except FileNotFoundError:
            return False

    def holder(self) -> dict[str, Any] | None:
        """Return ``pid``, ``host`` and more of the holder, by its own claim; None while the lock is free."""
        try:
            number, content = self._highest()
        except FileNotFoundError:
            return None
        fields = _parse(content)
        return fields if fields.get("pid") and self._judge(number, content) == "held" else None

    def _highest(self) -> tuple[int, bytes]:
        """Return number and content of the highest claim; 0 and no bytes if there is none."""
        try:
            number = max(self.claims.numbers(), default=0)
            return (number, self.claims.read(number)) if number else (0, b"")
        except OSError:
            self._last_look = None  # time without an answer does not count as silence
            raise

    def _judge(self, number: int, content: bytes) -> str:
        """Return the state of the highest claim: ``free``, ``dead``, ``silent`` (its lease is over) or ``held``."""
        fields = _parse(content)
        now = time.monotonic()
        if number == 0 or fields.get("released"):
            return "free"
        # Only of a process on this machine can it be known that it has ended.
        if is_of_this_machine(fields) and _start_time(fields["pid"]) != fields.get("started"):
            return "dead"
        # Another number or another beat: somebody lives, so silence counts from zero again.
        if (number, content) != self._last_seen:
            self._last_seen = (number, content)
            self._silence = 0.0
        elif self._last_look is not None:
            # A waiter that was stopped for an hour has not watched for an hour.
            self._silence += min(now - self._last_look, 2 * LONGEST_LOOK)
        self._last_look = now
        # The holder's own lease counts: it beats at that pace, and this process may have other settings.
        return "silent" if self._silence >= float(fields.get("lease", self.lease.seconds)) else "held"


def describe(content: bytes) -> str:
    """Describe the process that made a claim."""
    fields = _parse(content)
    if "pid" not in fields:
        return "another process"
    text = f"process {fields['pid']} on {fields.get('host', '?')}"
    minutes = (time.time() - float(fields.get("since", 0))) / 60
    # Two machines' clocks: the number is only for people, and is omitted if it cannot be.
    return f"{text}, for {minutes:.0f} min" if 0 <= minutes < 60 * 24 * 365 else text


FIELDS: dict[str, tuple[type, ...]] = {
    "token": (str,),
    "pid": (int,),
    "host": (str,),
    "machine": (str,),
    "started": (str,),
    "since": (int, float),
    "lease": (int, float),
    "beats": (int,),
    "released": (bool,),
}
"""Types of a claim's fields."""


def _parse(content: bytes) -> dict[str, Any]:
    """Return a claim's fields; empty for a half-written or damaged claim, which counts as held."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(fields, dict):
        return {}
    is_valid = all(isinstance(fields[name], types) for name, types in FIELDS.items() if name in fields)
    return fields if is_valid else {}


@cache
def _machine() -> str:
    """Return the id of this boot of this kernel, and of the namespace of process ids; empty if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Return the start of a process in ticks since the machine's start; empty for a process that has ended.

    The start distinguishes the process from a later process with the same id.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name, in parentheses, may hold spaces. Behind it: the state first, the start time 20th.
    fields = stat.rpartition(") ")[2].split()
    has_ended = not fields or fields[0] in ("Z", "X")
    return "" if has_ended else fields[19]


def is_of_this_machine(fields: dict[str, Any]) -> bool:
    """Return True for a claim whose process id means a process here: of this boot and this space of process ids."""
    return bool(_machine()) and fields.get("machine") == _machine() and isinstance(fields.get("pid"), int)
