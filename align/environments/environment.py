"""The interface of environments: an instance for each episode, made by a source. Torch-free.

A source is opened once, with all checks. It is a dataclass of JSON values, so other processes can make its instances.
The kinds of environments are in ``sources.py``, ``openenv_adapter.py`` and ``verifiers_adapter.py``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple, Protocol

from align.config.validation import suggest
from align.data import event_loop
from align.data.rows import Message, Row
from align.environments.results import (
    BadCall,
    EnvironmentFailed,
    Scores,
    Step,
    ToolError,
    clean,
    describe_exception,
    describe_failure,
)
from align.environments.tool_schema import argument_problem
from align.errors import UserError, shorten


class Action(NamedTuple):
    """An action of the policy in an earlier instance: a call of a tool, or a message (``name`` is None)."""

    name: str | None
    argument: Any
    """Arguments of the call, or the text of the message."""
    result: Any
    """Text of the tool's result, or the messages of the answer."""


class EnvironmentSource(Protocol):
    """The environment that a config names; a dataclass whose fields are JSON values."""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """JSON schemas of the tools; empty for an environment without tools."""
        ...

    @property
    def has_step(self) -> bool:
        """True if the environment answers messages that call no tool."""
        ...

    @property
    def can_save(self) -> bool:
        """True if instances have ``state`` and are restored from it."""
        ...

    def preload(self) -> None:
        """Import the modules that instances need, without making an instance."""
        ...

    def make(self) -> Environment:
        """Return a new instance. Raises ``EnvironmentFailed``."""
        ...


class Environment:
    """An instance for one episode. All methods except ``call`` raise ``EnvironmentFailed`` if they fail."""

    def __init__(self, tools: Sequence[dict[str, Any]], label: str = "") -> None:
        """Prepare to run the user's methods; ``label`` is the name of their class, empty for functions."""
        self._schemas = {schema["function"]["name"]: schema for schema in tools}
        self._label = label
        self._pending: Future[Any] | None = None
        """The coroutine that is running."""

    def reset(self, row: Row) -> list[Message] | None:
        """Begin the episode; return its first messages, or None for the row's prompt."""
        raise NotImplementedError

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Return a tool's result. Raises ``ToolError``, whose text the model reads, or ``EnvironmentFailed``."""
        raise NotImplementedError

    def step(self, message: str) -> Step:
        """Answer a message of the policy; called only if the source has ``has_step``."""
        raise NotImplementedError

    def score(self, messages: list[Message]) -> Scores:
        """Return the scores of the episode; ``messages`` is the conversation with all calls and results."""
        raise NotImplementedError

    def state(self) -> Any:
        """Return the instance's state as a JSON value; called only if the source has ``can_save``."""
        return None

    def restore(self, row: Row, actions: Sequence[Action], state: Any = None) -> int:
        """Bring a new instance to the point that an earlier one had reached.

        Args:
            row: The row of the episode.
            actions: Actions to repeat after the beginning, or after ``state``.
            state: The state that the earlier instance saved; None to begin with ``reset``.

        Returns:
            Number of actions whose result differs from the first time.
        """
        if state is None:
            self.reset(row)
        else:
            self.load(state)
        differing = 0
        for action in actions:
            result: Any
            try:
                if action.name is None:
                    result = self.step(action.argument).messages
                else:
                    result = self.call(action.name, action.argument)
            except ToolError as error:
                result = clean(str(error))  # as the journal has it
            differing += result != action.result
        return differing

    def load(self, state: Any) -> None:
        """Load the state of an earlier instance."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Cancel the coroutine that another thread waits for."""
        if self._pending is not None:
            self._pending.cancel()

    def close(self) -> None:
        """Release the instance's resources."""

    # ---- for the implementations ----

    def check_arguments(self, name: str, arguments: dict[str, Any]) -> None:
        """Raise ``BadCall`` for a tool that does not exist, and for arguments that it does not accept."""
        if name not in self._schemas:
            hint = suggest(name, self._schemas) or " There are no tools."
            raise BadCall(f"there is no tool '{shorten(name)}'.{hint}")
        problem = argument_problem(self._schemas[name], arguments)
        if problem is not None:
            raise BadCall(problem)

    def place(self, name: str) -> str:
        """Return the name of a method in messages."""
        return f"{self._label}.{name}" if self._label else name

    def run(self, name: str, method: Callable[..., Any], /, *inputs: Any, **arguments: Any) -> Any:
        """Return the result of a user's method. Any exception becomes ``EnvironmentFailed`` with its place."""
        try:
            return self._finish(method(*inputs, **arguments))
        except (EnvironmentFailed, UserError):
            raise
        except (Exception, SystemExit, CancelledError) as error:
            raise EnvironmentFailed(f"{self.place(name)} raised {describe_failure(error)}") from error

    def run_tool(self, name: str, method: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Return a tool's result. An exception becomes ``ToolError`` with its text."""
        try:
            return self._finish(method(**copy.deepcopy(arguments)))
        except (EnvironmentFailed, ToolError):
            raise
        except SystemExit as error:
            raise EnvironmentFailed(f"{self.place(name)} ended its process ({describe_exception(error)}).") from error
        except (Exception, CancelledError) as error:
            raise ToolError(describe_exception(error)) from error

    def _finish(self, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value
        # Coroutines run in the shared event loop. Another thread may cancel this one (cancel).
        self._pending = event_loop.start(value)
        try:
            return self._pending.result()
        finally:
            self._pending = None
