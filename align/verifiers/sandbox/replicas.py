"""Several processes of one program, among which the calls of its functions alternate.

A function that answers from what an earlier call stored, such as the argument of ``encode`` for the result of
``decode``, gives another result in a process that has not seen that call. An object of the program's class stays in the
process that made it, and so do the calls of its methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from align.verifiers.sandbox.session import Session


class SeparateObjects(Exception):
    """A call needs objects of different processes."""


class Replicas:
    """Processes that have loaded the same program. Tests see one number for each object, whichever process has it."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self._calls = 0

    def ask(self, request: dict[str, Any]) -> tuple[Session, dict[str, Any] | None]:
        """Return the process that a request went to, and its reply; None if there is none.

        Raises ``SeparateObjects``.
        """
        # Tests see the number ``own number * count + index of the process``, so its remainder tells which process has
        # the object.
        count = len(self._sessions)
        owners = {handle % count for handle in _handles(request)}
        if len(owners) > 1:
            raise SeparateObjects
        if owners:
            index = owners.pop()
        else:
            index = self._calls % count
            self._calls += 1
        session = self._sessions[index]
        reply = None
        if session.send(_renumber(request, lambda handle: handle // count)):
            reply = session.receive()
        try:
            return session, reply and _renumber(reply, lambda handle: handle * count + index)
        except RecursionError:
            return session, None


def _handles(data: Any) -> Iterator[int]:
    """Yield the numbers of the objects in a message."""
    if isinstance(data, dict):
        if isinstance(data.get("handle"), int):
            yield data["handle"]
        for value in data.values():
            yield from _handles(value)
    elif isinstance(data, list):
        for value in data:
            yield from _handles(value)


def _renumber(data: Any, number: Callable[[int], int]) -> Any:
    """Return a message whose objects have other numbers."""
    if isinstance(data, dict):
        return {
            key: number(value) if key == "handle" and isinstance(value, int) else _renumber(value, number)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [_renumber(value, number) for value in data]
    return data
