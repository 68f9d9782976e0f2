"""Waiting of OpenMP's threads between two operations: one run of a machine spins, all others sleep. Torch-free.

A thread that sleeps must be woken for each operation of a model, and on a virtual machine waking lasts as long as a
small operation. A thread that spins starts at once. But two processes that spin on the same cores slow each other down:
a step was ten times slower. So a process spins only while it holds a name that a machine has once; the kernel frees it
when the process ends. ``docs/performance.md`` has the measurements.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

SPINNING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "100000"}
"""libgomp's threads spin for about 2 ms before they sleep, which is longer than Python needs between operations."""
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Threads sleep at once; other work on the machine does not slow them down further."""
CLAIM = "\0align/spinning-threads"
"""Name of a socket without a file (``man 7 unix``), of which a machine, or a container, has one."""

_held: list[socket.socket] = []
"""Sockets that this process holds until its end."""


def is_chosen() -> bool:
    """Return True if the environment sets a variable for the waiting of threads, which is the user's choice."""
    return not SPINNING.keys().isdisjoint(os.environ)


@contextlib.contextmanager
def claim_spinning(name: str = CLAIM) -> Iterator[dict[str, str]]:
    """Yield the variables for processes that compute one after another inside this context.

    ``SPINNING`` for the first caller, ``SLEEPING`` while another process is inside, and none if the user has chosen.
    """
    if is_chosen():
        yield {}
        return
    claim = _bind(name)
    try:
        yield SLEEPING if claim is None else SPINNING
    finally:
        if claim is not None:
            claim.close()


def set_waiting(name: str = CLAIM) -> None:
    """Choose for this process until its end, before torch is imported; it keeps what its parent has chosen for it."""
    if is_chosen():
        return
    claim = _bind(name)
    if claim is not None:
        _held.append(claim)
    os.environ.update(SLEEPING if claim is None else SPINNING)


def waiting_beside(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables of a process that computes at the same time as the process with ``environment``."""
    spins = SPINNING.items() <= environment.items()
    return SLEEPING if spins else {}


def _bind(name: str) -> socket.socket | None:
    """Bind the name; None if another process has it, or if the system has no such names, like macOS."""
    try:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except (AttributeError, OSError):
        return None
    try:
        claim.bind(name)
    except OSError:
        claim.close()
        return None
    return claim
