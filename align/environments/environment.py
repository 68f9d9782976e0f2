"""The interface of environments, and the JSON schemas of their tools. Torch-free.

A source is opened once, with all checks, and makes an instance for each episode. It is a dataclass of JSON values, so
other processes can make its instances. A user's environments are opened by ``sources.py``, those of
other projects by extensions.

Schemas come from type hints and docstrings. transformers writes them, because its chat templates read them. It converts
an unknown hint to an object, so hints are checked here first.
"""

from __future__ import annotations

import copy
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple, Protocol

from align.config.validation import hint_nearest, suggest
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
        """Bring a new instance to the point that an earlier instance had reached.

        Args:
            row: The row of the episode.
            actions: Actions to repeat after the beginning, or after ``state``.
            state: The state that the earlier instance saved; None to begin with ``reset``.

        Returns:
            Number of actions whose result differs from the first time.
        """
        if state is None:
            # The journal has the first messages, so only the effect of reset is needed.
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
            # A tool may change its arguments, and the episode records those that the model wrote.
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
        # Coroutines run in the shared event loop. Another thread may cancel this coroutine (cancel).
        self._pending = event_loop.start(value)
        try:
            return self._pending.result()
        finally:
            self._pending = None


PLAIN = (str, int, float, bool, type(None), Any, list, dict, tuple)
"""Hints with a JSON schema."""
CONTAINERS = (list, dict, tuple)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
KINDS: dict[str, tuple[str, Any]] = {
    "string": ("a text", str),
    "integer": ("a whole number", int),
    "number": ("a number", (int, float)),
    "boolean": ("true or false", bool),
    "array": ("a list", list),
    "object": ("a mapping", dict),
    "null": ("null", type(None)),
}
"""JSON's types: their names for the model, and Python's types."""


def tool_schema(function: Callable[..., Any], name: str, place: str) -> dict[str, Any]:
    """Return the JSON schema of a function or method that a model may call as ``name``.

    Raises ``UserError``, which begins with ``place``, for a function without docstring, for an argument without type
    hint or description, and for a hint that has no JSON schema.
    """
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    where = f"{place}: tool '{name}'"
    _check_hints(function, where)
    if not (inspect.getdoc(function) or "").strip():
        raise UserError(f"{where} has no docstring; the model learns from it what the tool does.")
    try:
        schema = get_json_schema(_with_docstring(function))["function"]
    except DocstringParsingException as error:
        raise UserError(
            f"{where}: {_first_sentence(error)} Describe each argument in the docstring, below a line `Args:`, as "
            "`name: what it means`."
        ) from None
    except TypeHintParsingException as error:
        raise UserError(f"{where}: {_first_sentence(error)}") from None
    # Templates write the complete schema into the prompt, and the return value is not part of a call.
    shown = {"name": name, "description": schema["description"], "parameters": schema["parameters"]}
    return {"type": "function", "function": shown}


def argument_problem(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """Return the error in a call's arguments as a sentence for the model; None if they are correct."""
    function = schema["function"]
    name = function["name"]
    parameters = function["parameters"]
    properties = parameters.get("properties", {})
    unknown = [argument for argument in arguments if argument not in properties]
    missing = [argument for argument in parameters.get("required", ()) if argument not in arguments]
    if unknown and not parameters.get("additionalProperties"):
        hint = hint_nearest(unknown[0], properties) or f" It takes {', '.join(properties) or 'no arguments'}."
        return f"{name} has no argument '{shorten(unknown[0])}'.{hint}"
    if missing:
        return f"{name} needs the argument '{missing[0]}'."
    for argument, value in arguments.items():
        problem = _value_problem(properties.get(argument, {}), value)
        if problem is not None:
            return f"{name}: the argument '{argument}' should be {problem}; it is {shorten(repr(value))}."
    return None


def _check_hints(function: Callable[..., Any], where: str) -> None:
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
    except Exception as error:  # a name that does not exist, or is imported only for type checkers
        raise UserError(f"{where}: its type hints cannot be read ({type(error).__name__}: {error}).") from None
    parameters = list(inspect.signature(function).parameters.values())
    # A method that is read from its class has the instance as its first parameter.
    if parameters and parameters[0].name in ("self", "cls") and parameters[0].annotation is inspect.Parameter.empty:
        parameters = parameters[1:]
    for parameter in parameters:
        if parameter.kind not in NAMED:
            shown = str(parameter.replace(annotation=inspect.Parameter.empty))
            raise UserError(f"{where} takes '{shown}', which has no JSON schema; name each argument.")
        if parameter.name not in hints:
            raise UserError(
                f"{where}: the argument '{parameter.name}' has no type hint; write `{parameter.name}: str`."
            )
        _check_hint(hints[parameter.name], parameter.name, where)


def _check_hint(hint: Any, argument: str, where: str) -> None:
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin is typing.Literal:
        if all(isinstance(value, str | int | float | bool | None) for value in inner):
            return
    elif origin in CONTAINERS or origin in (typing.Union, types.UnionType):
        for part in inner:
            _check_hint(part, argument, where)
        return
    elif hint in PLAIN:
        return
    name = getattr(hint, "__name__", None) if origin is None else None
    raise UserError(
        f"{where}: the type hint of '{argument}', {name or hint}, has no JSON schema; use str, int, list or similar."
    )


def _with_docstring(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function with its inherited docstring, which transformers does not look up."""
    if function.__doc__:
        return function
    inner = inspect.unwrap(getattr(function, "__func__", function))
    copy = types.FunctionType(inner.__code__, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
    copy.__annotations__ = inner.__annotations__
    copy.__kwdefaults__ = inner.__kwdefaults__
    copy.__doc__ = inspect.getdoc(function)
    return copy


def _first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."


def _value_problem(schema: Mapping[str, Any], value: Any) -> str | None:
    """Return a description of the expected value; None if the value is valid."""
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        problems = [_value_problem(choice, value) for choice in schema["anyOf"]]
        if None in problems:
            return None
        return " or ".join(problem for problem in problems if problem is not None)
    if "enum" in schema:
        return None if value in schema["enum"] else f"one of {', '.join(map(repr, schema['enum']))}"
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if kinds and not any(_is_of_kind(value, kind) for kind in kinds):
        return " or ".join(KINDS[kind][0] if kind in KINDS else kind for kind in kinds)
    items = schema.get("items")
    if items and isinstance(value, list):
        problems = [_value_problem(items, item) for item in value]
        problem = next((problem for problem in problems if problem is not None), None)
        return None if problem is None else f"a list, each item {problem}"
    return None


def _is_of_kind(value: Any, kind: str) -> bool:
    # In Python True is an integer. In JSON it is not.
    if isinstance(value, bool):
        return kind == "boolean"
    return kind not in KINDS or isinstance(value, KINDS[kind][1])
