"""Server-sent events: a stream of states that are sent when they change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from sse_starlette import EventSourceResponse

from align.errors import UserError

SHARE_OF_TIME = 0.1
"""Largest share of the time that goes into reading one stream's state."""
PING = 20
"""Seconds between two comments that keep an idle stream open."""


def stream_states(read: Callable[[], Any], seconds: float) -> EventSourceResponse:
    """Return a stream of the values of ``read`` as JSON: at once, and then whenever the value differs.

    ``read`` runs in a thread, every ``seconds`` at most. A ``UserError`` is sent as the event ``problem``, and the
    stream continues: a store may be away for a while. The stream ends with the page, and when the studio ends.
    """
    return EventSourceResponse(_states(read, seconds), ping=PING)


async def _states(read: Callable[[], Any], seconds: float) -> AsyncIterator[dict[str, str]]:
    last = ""
    loop = asyncio.get_running_loop()
    while True:
        started = loop.time()
        try:
            event = {"event": "state", "data": to_json(await asyncio.to_thread(read))}
        except (UserError, OSError) as error:
            event = {"event": "problem", "data": to_json({"error": str(error)})}
        if event["data"] != last:
            last = event["data"]
            yield event
        spent = loop.time() - started
        await asyncio.sleep(max(seconds, spent / SHARE_OF_TIME))


def to_json(value: Any) -> str:
    """Return compact JSON on one line. Raises ``ValueError`` for NaN, which no browser reads."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
