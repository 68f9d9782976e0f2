"""Environments from a user's class or functions, and the choice between all kinds of environments. Torch-free."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from align.config.environment import METHODS, NO_TOOLS, EnvironmentConfig, tool_name, two_answers
from align.config.user_functions import check_call, check_methods, full_path, load_function
from align.config.validation import validate_plain
from align.config.verifiers import EnvironmentVerifier
from align.data.rows import Message, Row
from align.environments.environment import Action, Environment, EnvironmentSource, tool_schema
from align.environments.results import (
    EnvironmentFailed,
    Scores,
    Step,
    read_prompt,
    read_scores,
    read_step,
    read_text,
)
from align.errors import UserError
from align.judges.client import environment_judge
from align.registry import Adapter, failure_note, load, registered
from align.scoring.functions import SCORE, FunctionScorer, function_scorer
from align.scoring.judges import JudgeScorer, judge_scorer
from align.scoring.verifiers import VerifierScorer, open_verifier

MESSAGES = "messages"
RESPONSE = "response"
"""Parameters of a function or method that scores: the whole conversation, or the policy's last turn."""


def open_environment(config: EnvironmentConfig, place: str = "environment") -> EnvironmentSource:
    """Import the environment that a config names, and check everything that needs no episode.

    Raises ``UserError``, which begins with ``place``.
    """
    if config.class_name is not None:
        return open_class(config, place)
    for name, adapter in registered(Adapter).items():
        if getattr(config, name) is not None:
            source: EnvironmentSource = load(adapter.code)(config, place)
            return source
    if config.openenv is not None or config.verifiers is not None:
        raise UserError(f"{place}: align's extension for it is not there.{failure_note()}")
    # With a simulated user there may be no tools, only a function that scores.
    return open_functions(config, place)


# ---- a class ----


@dataclass(frozen=True)
class ClassSource:
    """A class of the user's, with its keyword arguments."""

    path: str
    arguments: Mapping[str, Any]
    tools: list[dict[str, Any]]
    has_step: bool
    can_save: bool
    score_takes: str | None
    """Parameter of ``score`` after the instance: ``messages``, ``response``, or None."""
    max_result_tokens: int
    place: str = "environment"

    def preload(self) -> None:
        """Import the class."""
        load_function(self.path, f"{self.place}.class")

    def make(self) -> ClassEnvironment:
        """Return a new instance. Raises ``EnvironmentFailed``."""
        return ClassEnvironment(self)


def open_class(config: EnvironmentConfig, place: str) -> ClassSource:
    """Return the source of a class. Raises ``UserError``, which begins with ``place``, if it is not an environment."""
    path = str(config.class_name)
    where = f"{place}.class"
    kind: Any = load_function(path, where)
    name = tool_name(path)
    is_class = inspect.isclass(kind)
    if not is_class:
        raise UserError(f"{where} '{path}': {name} is no class; name a class, or list functions under `tools`.")
    check_methods(path, dir(kind), METHODS, where)
    check_call(kind, config.arguments, name, where, positional=0, field="class")
    for method, call in (("reset", "reset(self, row)"), ("step", "step(self, message)"), ("load", "load(self, state)")):
        if hasattr(kind, method) and not _accepts_two(getattr(kind, method)):
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
    public = [name for name in names if not name.startswith("_")]
    tools = [name for name in public if name not in NO_TOOLS]
    return [name for name in tools if inspect.isroutine(getattr(kind, name))]


def _accepts_two(method: Callable[..., Any]) -> bool:
    """Return whether a method accepts the instance and one more argument by position."""
    try:
        inspect.signature(method).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return True
    return True


def _score_parameter(score: Callable[..., Any], place: str) -> str | None:
    names = []
    for parameter in list(inspect.signature(score).parameters.values())[1:]:
        # Other parameters with a default are the class's own options.
        is_required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if is_required or parameter.name in (MESSAGES, RESPONSE):
            names.append(parameter.name)
    if not names:
        return None
    if len(names) > 1 or names[0] not in (MESSAGES, RESPONSE):
        raise UserError(
            f"{place}: its score takes {', '.join(names)}; write `score(self)`, `score(self, messages)` with the whole "
            "conversation, or `score(self, response)` with the policy's last turn."
        )
    return names[0]


class ClassEnvironment(Environment):
    """An instance of a user's class."""

    def __init__(self, source: ClassSource) -> None:
        """Make the instance. Raises ``EnvironmentFailed`` if its ``__init__`` raises."""
        super().__init__(source.tools, tool_name(source.path))
        self._source = source
        kind = load_function(source.path, f"{source.place}.class")
        # Pass a copy, so one instance cannot change the arguments of the next.
        self._instance = self.run("__init__", kind, **copy.deepcopy(dict(source.arguments)))

    def reset(self, row: Row) -> list[Message] | None:
        """Begin the episode; return its first messages, or None for the row's prompt."""
        return read_prompt(self.run("reset", self._instance.reset, copy.deepcopy(row)), row, self.place("reset"))

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Return a tool's result. Raises ``ToolError`` or ``EnvironmentFailed``."""
        self.check_arguments(name, arguments)
        result = self.run_tool(name, getattr(self._instance, name), arguments)
        return read_text(result, self._source.max_result_tokens)

    def step(self, message: str) -> Step:
        """Answer a message of the policy."""
        value = self.run("step", self._instance.step, message)
        return read_step(value, self._source.max_result_tokens, self.place("step"))

    def score(self, messages: list[Message]) -> Scores:
        """Return the scores of the episode."""
        inputs: list[Any] = []
        if self._source.score_takes == MESSAGES:
            inputs = [copy.deepcopy(messages)]
        elif self._source.score_takes == RESPONSE:
            inputs = [_last_response(messages)]
        return read_scores(self.run("score", self._instance.score, *inputs), self.place("score"))

    def state(self) -> Any:
        """Return the instance's state after a round trip through JSON."""
        state = self.run("state", self._instance.state)
        try:
            return json.loads(json.dumps(state))
        except (TypeError, ValueError) as error:
            raise EnvironmentFailed(
                f"{self.place('state')} returned what JSON cannot hold ({error}); return texts, numbers, "
                "lists and mappings."
            ) from None

    def load(self, state: Any) -> None:
        """Load the state of an earlier instance."""
        self.run("load", self._instance.load, copy.deepcopy(state))

    def close(self) -> None:
        """Call the instance's ``close``, if it has one."""
        if hasattr(self._instance, "close"):
            self.run("close", self._instance.close)


# ---- functions ----


@dataclass(frozen=True)
class FunctionSource:
    """Functions of the user's as tools, and a function or a verifier that scores."""

    paths: list[str]
    score: str | dict[str, Any]
    """Path of a function, or the fields of a verifier."""
    arguments: Mapping[str, Any]
    tools: list[dict[str, Any]]
    max_result_tokens: int
    place: str = "environment"
    has_step: bool = False
    can_save: bool = False

    def preload(self) -> None:
        """Import the functions. There may be no tools if a simulated user speaks with the policy."""
        assert self.functions is not None and self.scorer is not None

    def make(self) -> FunctionEnvironment:
        """Return a new instance."""
        return FunctionEnvironment(self)

    @cached_property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The tools by name."""
        return {tool_name(path): load_function(path, f"{self.place}.tools") for path in self.paths}

    @cached_property
    def scorer(self) -> FunctionScorer | VerifierScorer | JudgeScorer:
        """The function, the verifier or the judge that scores."""
        place = f"{self.place}.score"
        if isinstance(self.score, dict):
            verifier = validate_plain(EnvironmentVerifier, self.score)
            if verifier.judge is not None:
                return judge_scorer(environment_judge(verifier.judge, place), verifier, place)
            return open_verifier(verifier, place)
        # The pool of the instances limits the call.
        return function_scorer(self.score, self.arguments, place=place, timeout=None)


def open_functions(config: EnvironmentConfig, place: str) -> FunctionSource:
    """Return the source of functions. Raises ``UserError``, which begins with ``place``, if one cannot be a tool."""
    paths = config.tools or []
    tools = []
    for index, path in enumerate(paths):
        where = f"{place}.tools[{index}]"
        function = load_function(path, where)
        if inspect.isclass(function):
            raise UserError(f"{where} '{path}': it is a class; name it as `class`, or list functions.")
        tools.append(tool_schema(function, tool_name(path), where))
    if isinstance(config.score, EnvironmentVerifier):
        score: str | dict[str, Any] = config.score.model_dump()
    else:
        score = full_path(str(config.score), f"{place}.score")
    source = FunctionSource(paths, score, config.arguments, tools, config.max_result_tokens, place)
    # A mistake is reported before a model is loaded.
    source.preload()
    source.scorer.check()
    return source


class FunctionEnvironment(Environment):
    """An episode with functions as tools. They have no state, so no action is repeated."""

    def __init__(self, source: FunctionSource) -> None:
        super().__init__(source.tools)
        self.source = source
        self.row: Row = {}

    def reset(self, row: Row) -> list[Message] | None:
        """Keep the row; the episode begins with its prompt."""
        self.row = row
        return None

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Return a tool's result. Raises ``ToolError`` or ``EnvironmentFailed``."""
        self.check_arguments(name, arguments)
        return read_text(self.run_tool(name, self.source.functions[name], arguments), self.source.max_result_tokens)

    def step(self, message: str) -> Step:
        """End the episode: functions answer no message."""
        return Step([], True)

    def score(self, messages: list[Message]) -> Scores:
        """Return the score of the last response, or of the conversation if the function has ``messages``."""
        scorer = self.source.scorer
        row = {"id": ""} | copy.deepcopy(self.row)
        if isinstance(scorer, FunctionScorer) and MESSAGES in _parameters(scorer.function)[:2]:
            place = tool_name(scorer.path)
            value = self.run(place, scorer.function, row, copy.deepcopy(messages), **scorer.arguments)
            return read_scores(value, place)
        try:
            scored = self.run(scorer.path, scorer.score, [row], [_last_response(messages)])
        except UserError as error:
            raise EnvironmentFailed(str(error)) from None
        # A judge may not have decided on a criterion, which is then no number.
        values = {SCORE: scored.total, **scored.metrics}
        finite = {name: value[0] for name, value in values.items() if math.isfinite(value[0])}
        return read_scores(finite, scorer.path)

    def restore(self, row: Row, actions: Sequence[Action], state: Any = None) -> int:
        """Keep the row. No function is called again."""
        self.row = row
        return 0


def _last_response(messages: Sequence[Message]) -> str:
    """Return the text of the policy's last turn; empty if there is none."""
    return next((str(turn.get("content") or "") for turn in reversed(messages) if turn["role"] == "assistant"), "")


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []  # written in C, without a signature
