"""Environments as the rest of align sees them: an instance for each episode, made by a source. Torch-free.

A source is opened once, with all checks. It is a dataclass of what JSON holds, so that processes of their own can make
its instances. Leaves out the kinds of environments, which have files of their own, and time limits
(``worker_pool.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from align.config.validation import suggest
from align.data.rows import Message, Row
from align.environments.errors import BadCall, ToolError
from align.environments.results import Scores, Step, clean
from align.environments.tool_schema import argument_problem
from align.errors import shorten

MESSAGES, RESPONSE = "messages", "response"
"""Parameters of a function or method that scores: the whole conversation, or the policy's last turn."""


class Action(NamedTuple):
    """Something that a policy did in an earlier instance: a call of a tool, or a message (``name`` is None)."""

    name: str | None
    argument: Any
    """Arguments of the call, or the text of the message."""
    result: Any
    """Text of the tool's result, or the messages of the answer."""


class Environment(Protocol):
    """An instance, for one episode. All methods but ``call`` raise ``EnvironmentFailed`` where something goes wrong."""

    def reset(self, row: Row) -> list[Message] | None:
        """Begin the episode; return its first messages, or None for the row's prompt."""
        ...

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Return a tool's result. Raises ``ToolError``, whose text the model reads, or ``EnvironmentFailed``."""
        ...

    def step(self, message: str) -> Step:
        """Answer a message of the policy. Only where the source has ``has_step``."""
        ...

    def score(self, messages: list[Message]) -> Scores:
        """Return how good the episode was; ``messages`` are all of it, with the policy's calls and tools' results."""
        ...

    def state(self) -> Any:
        """Return all that ``load`` needs, as JSON has it. Only where the source has ``can_save``."""
        ...

    def restore(self, row: Row, actions: Sequence[Action], state: Any = None) -> int:
        """Bring a new instance to where another one was: to its ``state``, or its beginning, and through ``actions``.

        Returns how many actions had another result than before.
        """
        ...

    def cancel(self) -> None:
        """Give up the call that runs in another thread, as far as that is possible."""
        ...

    def close(self) -> None:
        """Release what the instance holds."""
        ...


class EnvironmentSource(Protocol):
    """What a config names; a dataclass whose fields JSON holds."""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """JSON schemas of the tools; empty for an environment without tools."""
        ...

    @property
    def has_step(self) -> bool:
        """True where the environment answers messages that call no tool."""
        ...

    @property
    def can_save(self) -> bool:
        """True where instances have ``state`` and are restored from it."""
        ...

    def preload(self) -> None:
        """Import what instances need, and make none."""
        ...

    def make(self) -> Environment:
        """Return a new instance. Raises ``EnvironmentFailed``."""
        ...


def check_arguments(schemas: Mapping[str, dict[str, Any]], name: str, arguments: dict[str, Any]) -> None:
    """Raise ``BadCall`` for a tool that there is not, and for arguments that it does not take."""
    if name not in schemas:
        raise BadCall(f"there is no tool '{shorten(name)}'.{suggest(name, schemas) or ' There are no tools.'}")
    problem = argument_problem(schemas[name], arguments)
    if problem is not None:
        raise BadCall(problem)


def last_response(messages: Sequence[Message]) -> str:
    """Return the text of the policy's last turn; empty where it has none."""
    return next((str(turn.get("content") or "") for turn in reversed(messages) if turn["role"] == "assistant"), "")


def play_again(environment: Environment, actions: Sequence[Action]) -> int:
    """Repeat actions; return how many of them had another result than before."""
    differing = 0
    for action in actions:
        result: Any
        try:
            if action.name is None:
                result = environment.step(action.argument).messages
            else:
                result = environment.call(action.name, action.argument)
        except ToolError as error:
            result = clean(str(error))  # as the journal has it
        differing += result != action.result
    return differing
