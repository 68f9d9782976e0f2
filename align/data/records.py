"""A record as a source gives it, and one that cannot be read or understood. Torch-free."""

from __future__ import annotations

from typing import Any

from align.errors import UserError

Record = tuple[str, dict[str, Any]]
"""Where a record stands (``file:line``) and its fields."""


class BadRecord(UserError):
    """A record that is the data's mistake: ``on_error: stop`` raises it, ``drop`` counts it.

    ``where`` is its file and line, or its number; ``message`` says what is wrong, beginning with ``where``.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem

    @property
    def message(self) -> str:
        """The whole message."""
        return str(self)

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:
        return type(self), (self.where, self.problem)
