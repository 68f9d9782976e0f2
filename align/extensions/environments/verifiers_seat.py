"""The policy as the agent of an environment of the package verifiers. Torch-free.

The environment's code runs as a coroutine. When it asks its agent for a turn, it waits here for the policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import queue
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import Future
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.dialects import parse_message
from verifiers.v1.session import hook_boundary
from verifiers.v1.state import state_cls
from verifiers.v1.types import content_text
from verifiers.v1.utils.decorators import discover_decorated, invoke

from align.data import event_loop
from align.data.rows import Message
from align.environments.results import EnvironmentFailed
from align.patches.verifiers import set_state

END = None
"""Reply if the policy has no more turns."""


class Play:
    """One episode of a verifiers environment, which waits for the policy's turns."""

    def __init__(self, env: Any, task: Any) -> None:
        self.env = env
        self._task = task
        self._said: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        """Events of the coroutine: ``turn`` with new messages, ``done`` or ``failed``."""
        self._reply: asyncio.Future[list[Any] | None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._coroutine: Future[Any] | None = None
        self.trace: Any = None
        self.tools: dict[str, Any] = {}
        """Functions that the policy may call, by their names in its schemas."""

    def start(self) -> tuple[str, Any]:
        """Begin the episode; return its first event."""
        self._coroutine = event_loop.start(self._run())
        return self._said.get()

    def answer(self, reply: list[Any] | None) -> tuple[str, Any]:
        """Send the policy's messages, or ``END``; return the environment's next event."""
        if self._reply is None or self._loop is None:
            raise EnvironmentFailed("the environment of verifiers waits for no message.")
        waiting = self._reply
        self._reply = None
        # The caller is another thread, and only the loop's own thread may complete a future.
        self._loop.call_soon_threadsafe(waiting.set_result, reply)
        return self._said.get()

    def cancel(self) -> None:
        """End the episode without a score."""
        if self._coroutine is not None:
            self._coroutine.cancel()

    async def exchange(self, messages: list[Message]) -> list[Any] | None:
        """Send messages to the policy, and return its turn; ``END`` if it has no more turns."""
        # The future must exist before the messages are sent, because another thread may call answer() immediately.
        self._reply = asyncio.get_running_loop().create_future()
        waiting = self._reply
        self._said.put(("turn", messages))
        return await waiting

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            record = vf.TraceTask(
                type=type(self._task).__name__, data=self._task.data, key=self._task.key, hash=self._task.hash
            )
            episode = vf.Episode(env=vf.EnvInfo(id=self.env.config.env_id), task=record)
            agents = vf.Agents(self.env.config, lambda name, config: Seat(self, episode, name, config))
            await self.env.setup(agents)
            await self.env.run(self._task, agents)
            await self.env.finalize(self._task, episode)
            self._said.put(("done", None))
        except BaseException as error:
            # start() or answer() waits for a message, so a failure and a cancellation must send one.
            self._said.put(("failed", error))
            if not isinstance(error, Exception):
                raise


class Seat:
    """The agent that an environment's code uses."""

    def __init__(self, play: Play, episode: Any, name: str, config: Any) -> None:
        self._play = play
        self._episode = episode
        self._name = name
        self._config = config
        self.trainable = True

    async def run(self, task: Any, **options: Any) -> Any:
        """Have the policy answer a task's prompt; return the trace."""
        async with self.interaction(task, **options) as interaction:
            await interaction.turn()
        return interaction.trace

    @contextlib.asynccontextmanager
    async def interaction(self, task: Any, **options: Any) -> AsyncIterator[Conversation]:
        """Open a conversation with the policy. The task scores it at the end."""
        options.pop("on_trace", None)
        refused = [name for name, value in options.items() if value is not None]
        if refused:
            raise EnvironmentFailed(f"the environment gives its agent a {refused[0]}, which align does not support.")
        if self._play.trace is not None:
            raise EnvironmentFailed("the environment plays several conversations in one episode; align plays one.")
        trace = vf.Trace(
            task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
            state=state_cls(type(task))(),
            agent=vf.AgentInfo(config=self._config, name=self._name, trainable=self.trainable),
        )
        self._play.trace = trace
        available = {"task": task.data, "trace": trace, "runtime": None}
        await _wait(invoke(task.setup, available))
        # verifiers shares some tool servers among all tasks. Here every task has its own.
        taskset = self._play.env.taskset
        toolsets = [*taskset.toolsets(taskset.config), *task.toolsets(task.config)]
        self._play.tools = await start_tools(task, toolsets, trace.state)
        conversation = Conversation(self._play, task, trace, self._config.max_turns)
        # The environment's code now talks to the policy. Then its task scores the trace.
        yield conversation
        trace.stop("user_closed")
        await _wait(invoke(task.finalize, available))
        await task.score(trace)
        trace.ok = True
        self._episode.traces.append(trace)


class Conversation:
    """The open conversation with an agent that an environment's code uses."""

    def __init__(self, play: Play, task: Any, trace: Any, max_turns: int | None) -> None:
        self._play = play
        self._task = task
        self.trace = trace
        self._max_turns = max_turns
        self._is_over = False
        self._stops = [hook for hook in task.hooks("stop") if hook_boundary(hook, allow_trace=True) is vf.Trace]

    async def turn(self, message: Any = None) -> Any:
        """Send a message to the policy; return its messages up to the end of its turn."""
        new: list[Any] = []
        data = self._task.data
        if not self.trace.nodes:
            if data.system_prompt is not None:
                new.append(vf.SystemMessage(content=data.system_prompt))
            new += [vf.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else list(data.prompt or [])
        if isinstance(message, str):
            new.append(vf.UserMessage(content=message))
        else:
            new += [parse_message(item) if isinstance(item, dict) else item for item in message or []]
        # A stopped conversation requests no turn.
        reply = END
        if not (self._is_over or await self._is_stopped()):
            reply = await self._play.exchange([plain_message(item) for item in new])
        if reply is None:
            self._is_over = True
            self.trace.stop("max_turns")
            return vf.Segment(messages=[], terminated=True)
        # Messages enter the trace only once the policy has answered them.
        self._add(new, sampled=False)
        self._add(reply, sampled=True)
        return vf.Segment(messages=reply)

    async def _is_stopped(self) -> bool:
        if self._max_turns is not None and self.trace.num_turns >= self._max_turns:
            return True
        if not self.trace.nodes:
            return False
        available = {vf.Trace: self.trace, "trace": self.trace, "task": self._task.data}
        for stop in self._stops:
            if await _wait(invoke(stop, available)):
                self.trace.stop(stop.__name__)
                return True
        return False

    def _add(self, messages: list[Any], sampled: bool) -> None:
        for message in messages:
            parent = len(self.trace.nodes) - 1 if self.trace.nodes else None
            is_sampled = sampled and message.role == "assistant"
            self.trace.nodes.append(vf.MessageNode(parent=parent, message=message, sampled=is_sampled))


def plain_message(message: Any) -> Message:
    """Return a message of verifiers in align's format. Raises ``EnvironmentFailed`` for an image."""
    if not isinstance(message.content, str | None) and any(part.type != "text" for part in message.content):
        raise EnvironmentFailed("the environment sends an image, and align's policies read only text.")
    converted = {"role": message.role, "content": content_text(message.content)}
    calls = getattr(message, "tool_calls", None)
    if calls:
        functions = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
        converted["tool_calls"] = json.dumps([{"type": "function", "function": function} for function in functions])
    return converted


async def start_tools(task: Any, toolsets: list[Any], state: Any) -> dict[str, Any]:
    """Start tool servers in this process; return their functions by their names in the policy's schemas."""
    functions: dict[str, Any] = {}
    for toolset in toolsets:
        set_state(toolset, state)
        await _wait(toolset.setup())
        await _wait(toolset.setup_task(task.data))
        functions |= tool_functions(toolset)
    return functions


def tool_functions(toolset: Any) -> dict[str, Any]:
    """Return the tools of a server by their names in the policy's schemas."""
    prefix = f"{toolset.server_name}_" if toolset.server_name else ""
    return {
        prefix + (getattr(function, "tool_name", None) or function.__name__): function
        for function in discover_decorated(toolset, "tool")
    }


async def tool_schemas(toolsets: list[Any]) -> list[dict[str, Any]]:
    """Return the JSON schemas of tool servers, equal to the schemas that verifiers' harness shows the model."""
    from mcp.server.mcpserver import MCPServer

    schemas = []
    for toolset in toolsets:
        server = MCPServer(toolset.server_name or type(toolset).__name__)
        toolset.register(server)
        prefix = f"{toolset.server_name}_" if toolset.server_name else ""
        for tool in await server.list_tools():
            function = {
                "name": prefix + tool.name,
                "description": inspect.cleandoc(tool.description or ""),
                "parameters": tool.input_schema,
            }
            schemas.append({"type": "function", "function": function})
    return schemas


async def _wait(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else value
