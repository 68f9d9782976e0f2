"""Environments of the package verifiers 0.4 (extra ``verifiers``): a taskset and its code. Torch-free.

The environment's code runs unchanged, with its prompts, user turns, tools and rewards, and the policy is its agent
(``verifiers_seat.py``). Several agents, harnesses that are programs, containers and images are refused. A row's column
``task`` has the number of its task; ``tasks`` makes such rows.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.config.environment import EnvironmentConfig
from align.config.user_functions import search_module_folders
from align.data.event_loop import wait_for
from align.data.rows import Message, Row
from align.environments.environment import Environment
from align.environments.results import (
    EnvironmentFailed,
    Scores,
    Step,
    describe_exception,
    describe_failure,
    read_messages,
    read_package_scores,
    read_step,
    read_text,
)
from align.errors import UserError, require_extra
from align.store.fingerprint import digest

if TYPE_CHECKING:
    from align.extensions.environments.verifiers_seat import Play

MOST_TASKS = 1000
"""Number of tasks to choose from for a row without a column ``task``."""
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class VerifiersSource:
    """An environment of verifiers, with the settings of its taskset."""

    name: str
    arguments: Mapping[str, Any]
    tools: list[dict[str, Any]]
    max_result_tokens: int
    has_step: bool = True
    """True: the environment reads every message of the policy, including the last."""
    can_save: bool = False

    def preload(self) -> None:
        """Import the environment."""
        _load(self.name, _canonical(self.arguments))

    def make(self) -> VerifiersEnvironment:
        """Return a new episode."""
        return VerifiersEnvironment(self)


def open_verifiers(config: EnvironmentConfig, place: str) -> VerifiersSource:
    """Import an environment. Raises ``UserError``, which begins with ``place``, if align cannot play it."""
    where = f"{place}.verifiers"
    name = str(config.verifiers)
    require_extra("verifiers", "verifiers", f"{where}:")
    search_module_folders()
    try:
        env = _load(name, _canonical(config.arguments))
    except Exception as error:
        raise UserError(
            f"{where} '{name}': verifiers cannot load it ({describe_exception(error)}). `arguments` are the fields of "
            "its taskset, and its package must be installed."
        ) from None
    objection = _objection(env)
    if objection:
        raise UserError(f"{where} '{name}': {objection}.")
    from align.extensions.environments.verifiers_seat import tool_schemas

    kind = type(env.taskset).task_type()
    toolsets = [*env.taskset.toolsets(env.taskset.config), *kind.toolsets(env.taskset.config.task)]
    tools = wait_for(tool_schemas(toolsets))
    names = [tool["function"]["name"] for tool in tools]
    repeated = sorted({tool for tool in names if names.count(tool) > 1})
    if repeated:
        raise UserError(f"{where} '{name}': two of its tools are called '{repeated[0]}'.")
    return VerifiersSource(name, config.arguments, tools, config.max_result_tokens)


def tasks(name: str, count: int, first: int = 0, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Yield tasks of an environment, as records of format ``prompt``, for a source of type ``python``.

    Their column ``task`` must be kept: ``keep: [task]``. Yields fewer if the taskset is smaller.
    """
    env = _load(name, _canonical(arguments))
    for place, task in enumerate(itertools.islice(env.taskset, first, first + count), start=first):
        data = task.data
        text = data.prompt_text or data.name or f"{name} {data.idx}"
        # An episode finds its task by its position, because a taskset may number tasks differently.
        yield {"prompt": text, "task": place}


class VerifiersEnvironment(Environment):
    """An episode of an environment of verifiers. It restores no state, so ``restore`` repeats the actions."""

    def __init__(self, source: VerifiersSource) -> None:
        super().__init__(source.tools)
        self._source = source
        self._env = _load(source.name, _canonical(source.arguments))
        self._play: Play | None = None
        self._called: list[Any] = []
        """Calls of the policy's turn and their results, as messages of verifiers."""
        self._is_done = False

    def reset(self, row: Row) -> list[Message] | None:
        """Begin the episode of the row's task."""
        from align.extensions.environments.verifiers_seat import Play

        self._play = Play(self._env, self._task(row))
        self._called = []
        self._is_done = False
        kind, value = self._play.start()
        messages = self._read(kind, value)
        if self._is_done:
            raise EnvironmentFailed("the environment ended before the policy spoke.")
        return read_messages(messages, ROLES, "verifiers returned", "messages")

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Return a tool's result. Raises ``ToolError`` or ``EnvironmentFailed``."""
        import verifiers.v1 as vf

        self.check_arguments(name, arguments)
        play = self._playing()
        text = ""
        try:
            result = self.run_tool(name, play.tools[name], arguments)
            text = read_text(result, self._source.max_result_tokens)
        except Exception as error:
            text = str(error)
            raise
        finally:
            # Failed calls are also recorded, because rewards and metrics read the complete conversation.
            identity = f"call_{len(self._called)}"
            call = vf.ToolCall(id=identity, name=name, arguments=json.dumps(arguments))
            self._called += [
                vf.AssistantMessage(content=None, tool_calls=[call]),
                vf.ToolMessage(tool_call_id=identity, content=text, name=name),
            ]
        return text

    def step(self, message: str) -> Step:
        """Give the environment a message of the policy."""
        import verifiers.v1 as vf

        reply = [*self._called, vf.AssistantMessage(content=message)]
        self._called = []
        messages = self._read(*self._playing().answer(reply))
        return read_step((messages, self._is_done), self._source.max_result_tokens, "verifiers")

    def score(self, messages: list[Message]) -> Scores:
        """Return the environment's rewards, after its end if it still waits for the policy."""
        play = self._playing()
        if not self._is_done:
            # Without another turn the environment runs to its end, and then computes its rewards.
            self._read(*play.answer(None))
        if not self._is_done or play.trace is None:
            raise EnvironmentFailed("the environment asks for another turn of a policy that has none left.")
        rewards = {name: reward for name, reward in play.trace.rewards.items() if reward is not None}
        metrics = {name: value for name, value in play.trace.metrics.items() if value is not None}
        parts = metrics | {name: reward.score for name, reward in rewards.items()}
        return read_package_scores(play.trace.reward, parts, self._source.name)

    def cancel(self) -> None:
        """End the running call and the episode."""
        super().cancel()
        if self._play is not None:
            self._play.cancel()

    def close(self) -> None:
        """End the episode."""
        self.cancel()

    def _playing(self) -> Play:
        if self._play is None:
            raise EnvironmentFailed("the environment of verifiers did not begin.")
        return self._play

    def _read(self, kind: str, value: Any) -> list[Message]:
        """Return the environment's messages; empty at its end. Raises ``EnvironmentFailed``."""
        if kind == "failed":
            if isinstance(value, EnvironmentFailed):
                raise value
            raise EnvironmentFailed(f"{self._source.name} raised {describe_failure(value)}") from value
        self._is_done = kind == "done"
        return value or []

    def _task(self, row: Row) -> Any:
        index = row.get("task")
        if not isinstance(index, int):
            # The task depends only on the row's id, so a restored episode has the same task.
            count = _count(self._source.name, _canonical(self._source.arguments))
            index = int(digest(str(row.get("id", "")))[:8], 16) % count
        task = next(itertools.islice(self._env.taskset, index, None), None)
        if task is None:
            raise EnvironmentFailed(f"{self._source.name} has no task {index}.")
        return task


@functools.lru_cache(maxsize=8)
def _load(name: str, arguments: str) -> Any:
    """Return an environment by the name of its taskset's package, and the settings of the taskset as JSON."""
    import verifiers.v1 as vf

    return vf.load_environment(vf.resolve_env_config({"taskset": json.loads(arguments) | {"id": name}}))


@functools.lru_cache(maxsize=8)
def _count(name: str, arguments: str) -> int:
    """Return the number of tasks, up to ``MOST_TASKS``."""
    count = sum(1 for _ in itertools.islice(_load(name, arguments).taskset, MOST_TASKS))
    if not count:
        raise EnvironmentFailed(f"{name} has no tasks.")
    return count


def _canonical(arguments: Mapping[str, Any]) -> str:
    return json.dumps(dict(arguments), sort_keys=True)


def _objection(env: Any) -> str | None:
    """Return the reason why align cannot play an environment; None if it can."""
    import verifiers.v1 as vf
    from verifiers.v1.configs.agent import agent_config_fields
    from verifiers.v1.session import hook_boundary

    seats = list(agent_config_fields(env.config))
    if len(seats) != 1:
        return f"it has the agents {', '.join(seats)}, and align plays one"
    if type(env).start is not vf.Env.start:
        return "it starts separate services, which align does not support"
    kind = type(env.taskset).task_type()
    if kind.NEEDS_CONTAINER:
        return "its tasks need a container"
    # A task without data, which is enough to find its hooks.
    probe = kind.__new__(kind)
    probe.config = env.taskset.config.task
    if any(hook_boundary(hook, allow_trace=True) is not vf.Trace for hook in kind.hooks(probe, "stop")):
        return "it stops at single requests of a model, which align does not send"
    return None
