"""Streamed answers of OpenAI-compatible servers: text, thoughts, calls and log-probabilities as they come. Torch-free.

A server that does not stream may answer with a whole chat completion. Leaves out retries: a person who waits for the
answer asks again.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from align.config.endpoint import EndpointConfig
from align.errors import UserError
from align.inference.completions import read_completion
from align.inference.endpoint_client import COMPLETIONS, MAX_REPLY_BYTES, Endpoint
from align.inference.transport import CONNECT_SECONDS

DATA = "data:"
END = "[DONE]"
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chunk:
    """A part of an answer, with its tokens if the server was asked for their log-probabilities."""

    text: str = ""
    thought: str = ""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    """Tokens as OpenAI describes them: ``token``, ``logprob`` and ``top_logprobs``."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """Parts of calls: ``index``, and ``id``, ``name`` or ``arguments``, which are joined."""
    reason: str = ""
    """Reason for the end in the last part, such as ``stop`` and ``length``."""


class StreamingEndpoint(Endpoint):
    """An endpoint whose answers are read while they are generated."""

    remedy = "Correct the settings of the endpoint."

    async def stream(self, messages: Messages, settings: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        """Yield the parts of the answer to a conversation. Closing the iterator ends the request.

        Args:
            settings: Further fields of the request, such as ``temperature``; None leaves a field to the server.

        Raises:
            UserError: for a server that cannot be reached, refuses the request or sends something else.
        """
        fields = {name: value for name, value in settings.items() if value is not None}
        body = {"model": self.config.model, "messages": list(messages), "stream": True, **fields, **self.config.extra}
        headers = {"User-Agent": "align", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # A pause between two parts is bounded, and not the answer as a whole: a person sees it grow.
        limits = httpx.Timeout(self.config.timeout, connect=min(CONNECT_SECONDS, self.config.timeout))
        try:
            async with (
                httpx.AsyncClient(timeout=limits, trust_env=self.config.url.startswith("https:")) as client,
                client.stream(
                    "POST", self.config.url + COMPLETIONS, content=json.dumps(body).encode(), headers=headers
                ) as response,
            ):
                async for chunk in self._read_parts(response):
                    yield chunk
        except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
            reason = f"{type(error).__name__}: {self._clean(str(error))}".rstrip(": ")
            raise UserError(
                f"The endpoint {self.config.url} could not be asked: {reason}. Start it, or correct the address."
            ) from None

    async def _read_parts(self, response: httpx.Response) -> AsyncIterator[Chunk]:
        """Yield the parts of a response. Raises ``UserError`` for another status or content."""
        if response.status_code != 200:
            quote = self._quote(await _read_beginning(response))
            raise UserError(
                f"The endpoint {self.config.url} answers with status {response.status_code}{quote}. {self.remedy}"
            )
        if "text/event-stream" not in response.headers.get("content-type", ""):
            yield self._read_whole(await _read_beginning(response))
            return
        size = 0
        async for line in response.aiter_lines():
            size += len(line)
            if size > MAX_REPLY_BYTES:
                raise UserError(f"The endpoint {self.config.url} sent more than {MAX_REPLY_BYTES >> 20} MiB.")
            # Lines without the prefix are comments and empty lines, which servers send to keep the connection open.
            data = line.removeprefix(DATA).strip() if line.startswith(DATA) else ""
            if data == END:
                return
            if data:
                yield self._read_part(data)

    def _read_part(self, data: str) -> Chunk:
        try:
            content = json.loads(data)
            choices = content.get("choices") or []
            chunk = _read_choice(choices[0]) if choices else Chunk()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise self._unreadable(error) from None
        if "error" in content:
            raise UserError(f"The endpoint {self.config.url} ended its answer{self._quote(data.encode())}.")
        return chunk

    def _read_whole(self, data: bytes) -> Chunk:
        try:
            completion = json.loads(data)
            answer = read_completion(completion)
            message = completion["choices"][0]["message"]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise self._unreadable(error) from None
        calls = [{"index": index, **call} for index, call in enumerate(answer.tool_calls)]
        logprobs = completion["choices"][0].get("logprobs") or {}
        return Chunk(
            text=answer.text,
            thought=_text(message.get("reasoning_content")),
            tokens=list(logprobs.get("content") or []),
            calls=calls,
            reason="stop" if answer.finished else "length",
        )

    def _unreadable(self, error: Exception) -> UserError:
        reason = self._clean(str(error))[:200]
        return UserError(f"The endpoint {self.config.url} sent something that is no chat completion ({reason}).")


def open_endpoint(url: str, model: str, key_variable: str | None, timeout: float) -> StreamingEndpoint:
    """Return the endpoint of an address and a model.

    Raises ``UserError`` for an address that is refused, and for a key whose variable is not set.
    """
    from pydantic import ValidationError

    try:
        config = EndpointConfig(url=url, model=model, key_variable=key_variable or None, timeout=timeout)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"endpoint.{place}: {first['msg'].removeprefix('Value error, ')}.") from None
    return StreamingEndpoint(config)


def _read_choice(choice: Mapping[str, Any]) -> Chunk:
    delta = choice.get("delta") or {}
    logprobs = choice.get("logprobs") or {}
    calls = []
    for call in delta.get("tool_calls") or []:
        function = call.get("function") or {}
        parts = {"id": call.get("id"), "name": function.get("name"), "arguments": function.get("arguments")}
        texts = {name: value for name, value in parts.items() if isinstance(value, str)}
        calls.append({"index": int(call.get("index") or 0), **texts})
    return Chunk(
        text=_text(delta.get("content")),
        thought=_text(delta.get("reasoning_content")) or _text(delta.get("reasoning")),
        tokens=list(logprobs.get("content") or []),
        calls=calls,
        reason=_text(choice.get("finish_reason")),
    )


def _text(value: Any) -> str:
    """Return a text without halves of surrogates; empty for anything else."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else ""


async def _read_beginning(response: httpx.Response) -> bytes:
    """Return a body, cut at the largest size of an answer."""
    data = bytearray()
    async for part in response.aiter_bytes():
        data += part
        if len(data) > MAX_REPLY_BYTES:
            break
    return bytes(data)
