"""Calls of a user's methods and functions, sync and async, and what becomes of their exceptions. Torch-free."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

from align.data import event_loop
from align.environments.errors import EnvironmentFailed, ToolError
from align.environments.results import describe_exception
from align.errors import UserError


class Methods:
    """Calls of a user's methods, sync and async, one at a time."""

    def __init__(self, label: str) -> None:
        self._label = label
        """Name of the class; empty for functions."""
        self._pending: Future[Any] | None = None
        """The coroutine that is waited for."""

    def place(self, name: str) -> str:
        """Return what a method is called in messages."""
        return f"{self._label}.{name}" if self._label else name

    def run(self, name: str, method: Callable[..., Any], /, *inputs: Any, **arguments: Any) -> Any:
        """Return a method's result; raise ``EnvironmentFailed``, which says where, for any exception but that."""
        try:
            return self._finish(method(*inputs, **arguments))
        except (EnvironmentFailed, UserError):
            raise
        except (Exception, SystemExit, CancelledError) as error:
            raise EnvironmentFailed(f"{self.place(name)} raised {describe_failure(error)}") from error

    def run_tool(self, name: str, method: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Return a tool's result; raise ``ToolError`` with the text of an exception."""
        try:
            return self._finish(method(**copy.deepcopy(arguments)))
        except (EnvironmentFailed, ToolError):
            raise
        except SystemExit as error:
            raise EnvironmentFailed(f"{self.place(name)} ended its process ({describe_exception(error)}).") from error
        except (Exception, CancelledError) as error:
            raise ToolError(describe_exception(error)) from error

    def cancel(self) -> None:
        """Cancel the coroutine that is waited for, if there is one."""
        if self._pending is not None:
            self._pending.cancel()

    def _finish(self, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value
        # Coroutines run in the shared event loop. Another thread may cancel this one (cancel).
        self._pending = event_loop.start(value)
        try:
            return self._pending.result()
        finally:
            self._pending = None


def describe_failure(error: BaseException) -> str:
    """Return an exception that ended something, with the line in which it was raised."""
    return f"{describe_exception(error)}{_line(error)}"


def _line(error: BaseException) -> str:
    """Return the file and line in which an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})." if frames else "."
