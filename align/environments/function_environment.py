"""Plain functions of the user's as an environment: tools without a state, and a function that scores. Torch-free."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from align.config.environment import EnvironmentConfig, tool_name
from align.config.user_functions import full_path, load_function
from align.data.rows import Message, Row
from align.data.scoring import SCORE, FunctionScorer, function_scorer
from align.environments.environment import MESSAGES, Action, check_arguments, last_response
from align.environments.errors import EnvironmentFailed
from align.environments.methods import Methods
from align.environments.results import Scores, Step, read_scores, read_text
from align.environments.tool_schema import tool_schema
from align.errors import UserError


@dataclass(frozen=True)
class FunctionSource:
    """Functions of the user's as tools, and one that scores."""

    paths: list[str]
    score_path: str
    arguments: Mapping[str, Any]
    tools: list[dict[str, Any]]
    max_result_tokens: int
    place: str = "environment"
    has_step: bool = False
    can_save: bool = False

    def preload(self) -> None:
        """Import the functions. There may be no tools: a simulated user then speaks with the policy."""
        assert self.functions is not None and self.scorer is not None

    def make(self) -> FunctionEnvironment:
        """Return a new instance."""
        return FunctionEnvironment(self)

    @cached_property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The tools by name."""
        return {tool_name(path): load_function(path, f"{self.place}.tools") for path in self.paths}

    @cached_property
    def scorer(self) -> FunctionScorer:
        """The function that scores."""
        return function_scorer(self.score_path, self.arguments, place=f"{self.place}.score")


def open_functions(config: EnvironmentConfig, place: str) -> FunctionSource:
    """Return the source of functions; raise ``UserError``, which begins with ``place``, for one that is no tool."""
    paths = config.tools or []
    tools = []
    for index, path in enumerate(paths):
        where = f"{place}.tools[{index}]"
        function = load_function(path, where)
        if inspect.isclass(function):
            raise UserError(f"{where} '{path}': it is a class; name it as `class`, or list functions.")
        tools.append(tool_schema(function, tool_name(path), where))
    score = full_path(str(config.score), f"{place}.score")
    source = FunctionSource(paths, score, config.arguments, tools, config.max_result_tokens, place)
    # A mistake is an error before a model is loaded.
    source.preload()
    return source


@dataclass
class FunctionEnvironment:
    """An episode with functions as tools. They have no state, so nothing is played again."""

    source: FunctionSource
    row: Row = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Prepare to call the functions."""
        self._methods = Methods("")
        self._schemas = {schema["function"]["name"]: schema for schema in self.source.tools}

    def reset(self, row: Row) -> list[Message] | None:
        """Keep the row; the episode begins with its prompt."""
        self.row = row
        return None

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Return a tool's result. Raises ``ToolError`` or ``EnvironmentFailed``."""
        check_arguments(self._schemas, name, arguments)
        result = self._methods.run_tool(name, self.source.functions[name], arguments)
        return read_text(result, self.source.max_result_tokens)

    def step(self, message: str) -> Step:
        """End the episode: functions answer no message."""
        return Step([], True)

    def score(self, messages: list[Message]) -> Scores:
        """Return the score of the last response, or of the conversation where the function takes ``messages``."""
        scorer, row = self.source.scorer, {"id": ""} | copy.deepcopy(self.row)
        if MESSAGES in _parameters(scorer.function)[:2]:
            place = tool_name(scorer.path)
            value = self._methods.run(place, scorer.function, row, copy.deepcopy(messages), **scorer.arguments)
            return read_scores(value, place)
        try:
            values = self._methods.run(scorer.path, scorer.score_parts, [row], [last_response(messages)])
        except UserError as error:
            raise EnvironmentFailed(str(error)) from None
        numbers = {name: value[0] for name, value in values.items()}
        return read_scores({name or SCORE: value for name, value in numbers.items()}, scorer.path)

    def state(self) -> Any:
        """Return nothing: functions have no state."""
        return None

    def restore(self, row: Row, actions: Sequence[Action], state: Any = None) -> int:
        """Keep the row. No function is called again."""
        self.row = row
        return 0

    def cancel(self) -> None:
        """Cancel the coroutine that is waited for, if there is one."""
        self._methods.cancel()

    def close(self) -> None:
        """Do nothing."""


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []  # written in C, without a signature
