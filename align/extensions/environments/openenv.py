"""An OpenEnv server as an environment, with one session for each episode (extra ``openenv``). Torch-free.

The policy calls the tools of a server of MCP tools. If a server's action is a single text, the policy's messages are
the actions. For any other server, the tool ``act`` has the action's fields as arguments. The score is the sum of the
rewards. OpenEnv saves no state, so an episode is restored by its seed, which depends on the row, and its actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from align.config.endpoint import LOCAL
from align.config.environment import EnvironmentConfig
from align.data.event_loop import wait_for
from align.data.rows import Message, Row, user
from align.environments.environment import Environment
from align.environments.results import (
    EnvironmentFailed,
    Scores,
    Step,
    ToolError,
    describe_exception,
    read_prompt,
    read_scores,
    read_step,
    read_text,
)
from align.errors import UserError, require_extra
from align.store.fingerprint import digest

ACT = "act"
"""Name of the tool if the server's action has several fields."""
OVER = "[the episode is over]"
MCP_ACTIONS = frozenset({"Action", "CallToolAction", "ListToolsAction"})
"""Titles of the action schemas of servers whose actions are calls of MCP tools."""
CAPACITY = " Is it there, with a max_concurrent_envs of at least the episodes that run at once?"
OPEN_SECONDS = 10.0
TOLD = ("EXECUTION_ERROR", "VALIDATION_ERROR")
"""Codes of errors that the model reads; other errors concern the session."""


@dataclass(frozen=True)
class OpenEnvSource:
    """A server and the format of its actions."""

    url: str
    arguments: Mapping[str, Any]
    tools: list[dict[str, Any]]
    message_field: str | None
    """Field of the action for a message; None for a server with tools."""
    is_mcp: bool
    max_result_tokens: int
    can_save: bool = False

    @property
    def has_step(self) -> bool:
        """True if the policy's messages are the actions."""
        return self.message_field is not None

    def preload(self) -> None:
        """Import the client."""
        import openenv.core.generic_client  # noqa: F401

    def make(self) -> OpenEnvEnvironment:
        """Return a new session, which connects when it begins."""
        return OpenEnvEnvironment(self)


def open_openenv(config: EnvironmentConfig, place: str) -> OpenEnvSource:
    """Ask a server for its actions. Raises ``UserError``, which begins with ``place``, if it does not answer."""
    where = f"{place}.openenv"
    require_extra("openenv", "openenv", f"{where}:")
    url = str(config.openenv)
    try:
        # A network's proxy does not reach this machine.
        is_local = urlsplit(url).hostname in LOCAL
        response = httpx.get(f"{url}/schema", timeout=OPEN_SECONDS, trust_env=not is_local)
        response.raise_for_status()
        schema = response.json()["action"]
        properties = {name: field for name, field in schema["properties"].items() if name != "metadata"}
        is_mcp = schema.get("title") in MCP_ACTIONS
        tools = _list_tools(url) if is_mcp else []
    except Exception as error:
        raise UserError(
            f"{where}: {url} does not answer as an OpenEnv server does ({describe_exception(error)}); start it."
        ) from None
    required = [name for name in schema.get("required", ()) if name in properties]
    message_field = None
    if not is_mcp:
        # If one text is required, the policy's messages are the actions. Otherwise a tool has all fields.
        if len(required) == 1 and properties[required[0]].get("type") == "string":
            message_field = required[0]
        else:
            parameters = {"type": "object", "properties": properties, "required": required}
            parameters |= {"$defs": schema["$defs"]} if "$defs" in schema else {}
            tools = [_tool(ACT, schema.get("description", "Act in the environment."), parameters)]
    if not (tools or message_field):
        raise UserError(f"{where}: the server at {url} has no tools.")
    return OpenEnvSource(url, config.arguments, tools, message_field, is_mcp, config.max_result_tokens)


class OpenEnvEnvironment(Environment):
    """A session of a server. It restores no state, so ``restore`` repeats the actions with the same seed."""

    def __init__(self, source: OpenEnvSource) -> None:
        super().__init__(source.tools)
        self._source = source
        # The pool abandons a call that exceeds its limit.
        self._client = _make_client(source.url, 86_400.0)
        self._rewards: list[float] = []
        self._is_over = False

    def reset(self, row: Row) -> list[Message] | None:
        """Begin the episode; the first observation is the user's message, unless it is empty."""
        seed = row.get("seed")
        if not isinstance(seed, int):
            # The seed depends only on the row, so a restored episode has the same beginning.
            seed = int(digest(str(row.get("id", "")))[:8], 16) >> 1
        try:
            result = self._request(self._client.reset(**({"seed": seed} | dict(self._source.arguments))))
        except ToolError as error:
            raise EnvironmentFailed(f"the server at {self._source.url} refused to reset: {error}.") from None
        self._rewards = []
        self._is_over = bool(result.done)
        return read_prompt(observation_text(result.observation) or None, row, "OpenEnv's reset")

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Return what the server answers to a call. Raises ``ToolError`` or ``EnvironmentFailed``."""
        self.check_arguments(name, arguments)
        if self._is_over:
            raise ToolError(OVER)
        action = arguments
        if self._source.is_mcp:
            action = {"type": "call_tool", "tool_name": name, "arguments": arguments}
        result = self._act(action)
        text = _tool_result(result.observation) if self._source.is_mcp else observation_text(result.observation)
        ending = f"\n{OVER}" if self._is_over else ""
        return read_text(text, self._source.max_result_tokens) + ending

    def step(self, message: str) -> Step:
        """Act with a message of the policy."""
        try:
            result = self._act({str(self._source.message_field): message.strip()})
        except ToolError as error:  # the server refused the message
            return read_step(str(error), self._source.max_result_tokens, "OpenEnv's step")
        text = observation_text(result.observation)
        messages = [user(text)] if text else []
        return read_step((messages, self._is_over), self._source.max_result_tokens, "OpenEnv's step")

    def score(self, messages: list[Message]) -> Scores:
        """Return the sum of the rewards."""
        return read_scores(sum(self._rewards), f"the server at {self._source.url}")

    def close(self) -> None:
        """End the session."""
        wait_for(self._client.close())

    def _act(self, action: dict[str, Any]) -> Any:
        result = self._request(self._client.step(action))
        self._is_over = bool(result.done)
        if result.reward is not None:
            # Restoring repeats all actions after reset(), so the sum is correct again.
            self._rewards.append(float(result.reward))
        return result

    def _request(self, request: Any) -> Any:
        try:
            return wait_for(request)
        except RuntimeError as error:
            text = str(error).removeprefix("Server error: ")
            if any(f"(code: {code})" in text for code in TOLD):
                raise ToolError(text) from None
            raise EnvironmentFailed(f"the server at {self._source.url} refused: {text}.{CAPACITY}") from None
        except Exception as error:
            # A full server closes the session without a message.
            raise EnvironmentFailed(
                f"the server at {self._source.url} ended the session ({describe_exception(error)}).{CAPACITY}"
            ) from None


def observation_text(observation: Any) -> str:
    """Return an observation as text: its only text, otherwise all of it as JSON; empty if it is empty."""
    if not isinstance(observation, Mapping):
        return "" if observation is None else read_text(observation, 1 << 20)
    fields = {name: value for name, value in observation.items() if name not in ("done", "reward", "metadata")}
    fields = {name: value for name, value in fields.items() if value is not None}
    if len(fields) == 1 and isinstance(text := next(iter(fields.values())), str):
        return text
    return read_text(fields, 1 << 20) if fields else ""


def _tool_result(observation: Mapping[str, Any]) -> str:
    """Return the result of an MCP tool. Raises ``ToolError`` if the tool failed."""
    error = observation.get("error")
    if error:
        raise ToolError(str(error.get("message") if isinstance(error, Mapping) else error))
    result = observation.get("result", observation)
    if isinstance(result, Mapping):
        if result.get("is_error"):
            raise ToolError(read_text(result.get("data") or result.get("content"), 1 << 20))
        # ``data`` has the value that the tool returned, ``content`` has MCP's representation of it.
        result = result.get("data") if result.get("data") is not None else result.get("content", result)
    return read_text(result, 1 << 20)


def _make_client(url: str, seconds: float) -> Any:
    from openenv.core.generic_client import GenericEnvClient

    return GenericEnvClient(url, connect_timeout_s=OPEN_SECONDS, message_timeout_s=seconds, mode="simulation")


def _list_tools(url: str) -> list[dict[str, Any]]:
    async def ask() -> Any:
        client = _make_client(url, OPEN_SECONDS)
        try:
            return await client.step({"type": "list_tools"})
        finally:
            await client.close()

    tools = wait_for(ask()).observation["tools"]
    return [_tool(tool["name"], tool["description"], tool["input_schema"]) for tool in tools]


def _tool(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": dict(parameters)}}
