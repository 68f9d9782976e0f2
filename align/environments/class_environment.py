"""A class of the user's as an environment: one instance for each episode, its public methods as tools. Torch-free."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.config.class_source import check_methods
from align.config.environment import METHODS, EnvironmentConfig, tool_name, two_answers
from align.config.function_arguments import check_call
from align.config.user_functions import load_function
from align.data.rows import Message, Row
from align.environments.environment import (
    MESSAGES,
    RESPONSE,
    Action,
    check_arguments,
    last_response,
    play_again,
)
from align.environments.errors import EnvironmentFailed
from align.environments.methods import Methods
from align.environments.results import Scores, Step, read_prompt, read_scores, read_step, read_text
from align.environments.tool_schema import tool_schema
from align.errors import UserError

NO_TOOLS = frozenset({"reset", "score", "step", "close", "state", "load"})
"""Public methods of a class that are no tools."""


@dataclass(frozen=True)
class ClassSource:
    """A class of the user's, with its keyword arguments."""

    path: str
    arguments: Mapping[str, Any]
    tools: list[dict[str, Any]]
    has_step: bool
    can_save: bool
    score_takes: str | None
    """Parameter of ``score`` beside the instance: ``messages``, ``response``, or None."""
    max_result_tokens: int
    place: str = "environment"

    def preload(self) -> None:
        """Import the class."""
        load_function(self.path, f"{self.place}.class")

    def make(self) -> ClassEnvironment:
        """Return a new instance. Raises ``EnvironmentFailed``."""
        return ClassEnvironment(self)


def open_class(config: EnvironmentConfig, place: str) -> ClassSource:
    """Return the source of a class; raise ``UserError``, which begins with ``place``, for no environment."""
    path, where = str(config.class_name), f"{place}.class"
    kind: Any = load_function(path, where)
    name = tool_name(path)
    is_class = inspect.isclass(kind)
    if not is_class:
        raise UserError(f"{where} '{path}': {name} is no class; name a class, or list functions under `tools`.")
    check_methods(path, dir(kind), METHODS, where)
    check_call(kind, config.arguments, name, where, positional=0, field="class")
    for method, call in (("reset", "reset(self, row)"), ("step", "step(self, message)"), ("load", "load(self, state)")):
        if hasattr(kind, method) and not _takes(getattr(kind, method), 2):
            raise UserError(f"{where} '{path}': its {method} takes other arguments; write it as `{call}`.")
    if config.user is not None and hasattr(kind, "step"):
        raise two_answers(path, place)
    if hasattr(kind, "state") != hasattr(kind, "load"):
        raise UserError(f"{where} '{path}': the class has one of state and load; write both, or neither.")
    tools = [tool_schema(getattr(kind, method), method, where) for method in public_methods(kind)]
    return ClassSource(
        path=path,
        arguments=config.arguments,
        tools=tools,
        has_step=hasattr(kind, "step"),
        can_save=hasattr(kind, "state"),
        score_takes=_score_parameter(kind.score, f"{where} '{path}'"),
        max_result_tokens=config.max_result_tokens,
        place=place,
    )


def public_methods(kind: type) -> list[str]:
    """Return the names of a class's tools, in the order in which it and its bases define them."""
    names: dict[str, None] = {}
    # Base classes come first, and so do the tools that they define.
    for base in reversed(kind.__mro__):
        names |= dict.fromkeys(vars(base))
    tools = [name for name in names if not name.startswith("_") and name not in NO_TOOLS]
    return [name for name in tools if inspect.isroutine(getattr(kind, name))]


def _takes(method: Callable[..., Any], arguments: int) -> bool:
    """Return whether a method takes so many arguments by position, the instance among them."""
    try:
        inspect.signature(method).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return True
    return True


def _score_parameter(score: Callable[..., Any], place: str) -> str | None:
    parameters = list(inspect.signature(score).parameters.values())[1:]
    names = [
        parameter.name
        for parameter in parameters
        if parameter.name in (MESSAGES, RESPONSE)
        or (parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    ]
    if not names:
        return None
    if len(names) > 1 or names[0] not in (MESSAGES, RESPONSE):
        raise UserError(
            f"{place}: its score takes {', '.join(names)}; write `score(self)`, `score(self, messages)` with the whole "
            "conversation, or `score(self, response)` with the policy's last turn."
        )
    return names[0]


class ClassEnvironment:
    """An instance of a user's class."""

    def __init__(self, source: ClassSource) -> None:
        """Make the instance. Raises ``EnvironmentFailed`` where its ``__init__`` raises."""
        self._source = source
        self._methods = Methods(tool_name(source.path))
        kind = load_function(source.path, f"{source.place}.class")
        # A copy, so that one instance cannot change the arguments of the next.
        self._instance = self._methods.run("__init__", kind, **copy.deepcopy(dict(source.arguments)))
        self._schemas = {schema["function"]["name"]: schema for schema in source.tools}

    def reset(self, row: Row) -> list[Message] | None:
        """Begin the episode; return its first messages, or None for the row's prompt."""
        value = self._methods.run("reset", self._instance.reset, copy.deepcopy(row))
        return read_prompt(value, row, self._methods.place("reset"))

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Return a tool's result. Raises ``ToolError`` or ``EnvironmentFailed``."""
        check_arguments(self._schemas, name, arguments)
        result = self._methods.run_tool(name, getattr(self._instance, name), arguments)
        return read_text(result, self._source.max_result_tokens)

    def step(self, message: str) -> Step:
        """Answer a message of the policy."""
        value = self._methods.run("step", self._instance.step, message)
        return read_step(value, self._source.max_result_tokens, self._methods.place("step"))

    def score(self, messages: list[Message]) -> Scores:
        """Return how good the episode was."""
        inputs: list[Any] = []
        if self._source.score_takes == MESSAGES:
            inputs = [copy.deepcopy(messages)]
        elif self._source.score_takes == RESPONSE:
            inputs = [last_response(messages)]
        return read_scores(self._methods.run("score", self._instance.score, *inputs), self._methods.place("score"))

    def state(self) -> Any:
        """Return the instance's state, as JSON reads it back."""
        state = self._methods.run("state", self._instance.state)
        try:
            return json.loads(json.dumps(state))
        except (TypeError, ValueError) as error:
            raise EnvironmentFailed(
                f"{self._methods.place('state')} returned what JSON cannot hold ({error}); return texts, numbers, "
                "lists and mappings."
            ) from None

    def restore(self, row: Row, actions: Sequence[Action], state: Any = None) -> int:
        """Bring the instance to where another one was."""
        if state is None:
            self.reset(row)
        else:
            self._methods.run("load", self._instance.load, copy.deepcopy(state))
        return play_again(self, actions)

    def cancel(self) -> None:
        """Cancel the coroutine that is waited for, if there is one."""
        self._methods.cancel()

    def close(self) -> None:
        """Call the instance's ``close``, if it has one."""
        if hasattr(self._instance, "close"):
            self._methods.run("close", self._instance.close)
