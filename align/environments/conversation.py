"""An episode's conversation, as people and stages that train read it: its beginning, its turns, and a row. Torch-free.

Leaves out tokens, which are the episode's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from align.data.formats.messages import tool_calls
from align.data.rows import Message, user
from align.environments.episode import Episode
from align.environments.turn_template import call_id_at

ROW_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")
"""Fields of a message that rows store."""


def opening(episode: Episode) -> list[Message]:
    """Return the messages before the policy's first turn; empty for an environment that failed at once."""
    places = turn_places(episode)
    return episode.messages[: places[0]] if places else list(episode.messages)


def turn_places(episode: Episode) -> list[int]:
    """Return the indices of the policy's turns among the messages; an environment's examples come before them."""
    if never_began(episode):
        return []
    places = [index for index, message in enumerate(episode.messages) if message["role"] == "assistant"]
    return places[-len(episode.turns) :]


def sampled_tokens(episode: Episode) -> int:
    """Count the tokens that the policy sampled."""
    return 0 if never_began(episode) else sum(turn.tokens for turn in episode.turns)


def never_began(episode: Episode) -> bool:
    """Return True where the environment failed before the first turn, in whose place a token stands."""
    return not episode.turns or any(map(math.isnan, episode.turns[0].logprobs))


def describe_episode(episode: Episode) -> dict[str, Any]:
    """Return the last answer, the turns with what was said before each, the calls, and how the episode ended."""
    return {
        "text": episode.text,
        "tokens": sampled_tokens(episode),
        "finished": episode.finished,
        "turns": list(_described_turns(episode)),
        "messages": episode.messages,
        "calls": [asdict(call) for call in episode.calls],
        "parts": episode.parts,
        "turn_scores": episode.turn_scores,
        "stop": episode.stop,
        "failure": episode.failure,
    }


def _described_turns(episode: Episode) -> Iterator[dict[str, Any]]:
    start = 0
    for turn, place in zip(episode.turns, turn_places(episode), strict=False):
        before = [str(message["content"]) for message in episode.messages[start:place]]
        yield {"prompt": "\n".join(before), "text": turn.text, "finished": turn.finished}
        start = place + 1


# ---- rows ----


def prompt_of(episode: Episode) -> list[Message]:
    """Return how the episode began, as the ``prompt`` of a row."""
    return [_row_message(message) for message in opening(episode)]


def answer_of(episode: Episode, marks_malformed: bool = False) -> list[Message]:
    """Return what followed the beginning, as the answer of a row: turns of the assistant and what it was told.

    It ends with the last turn: what came after that was read by nobody. A turn with a malformed call is the text that
    was sampled; ``marks_malformed`` excludes it from training (``train: False``). Calls and results have ids, as some
    chat templates need them. Those of a server are numbered anew: it draws them, so equal episodes would differ.
    """
    places = turn_places(episode)
    if not places:
        return []
    # Ids that a policy sampled are part of its text.
    keeps_ids = not _is_served(episode)
    return _answer(episode, places, places[-1] + 1, marks_malformed=marks_malformed, keeps_ids=keeps_ids)


def dialogue(episode: Episode) -> list[Message]:
    """Return the whole conversation so far, as rows have messages, for a model to go on with."""
    places = turn_places(episode)
    return [*prompt_of(episode), *(_answer(episode, places, len(episode.messages)) if places else [])]


def _answer(
    episode: Episode, places: Sequence[int], end: int, *, marks_malformed: bool = False, keeps_ids: bool = True
) -> list[Message]:
    """Return the messages from the first of the turns at ``places`` up to ``end``.

    In an episode of a server, what answers a malformed call is a user's: for a result of a tool there must be a call.
    """
    is_served = _is_served(episode)
    malformed = {call.turn for call in episode.calls if call.error == "malformed"}
    answer: list[Message] = []
    ids: list[str] = []
    """Ids of the last turn's calls that have no result yet."""
    for index in range(places[0], end):
        message = episode.messages[index]
        if index in places:
            turn = places.index(index)
            # This call has no structure to store, so the sampled text stands for it.
            if turn in malformed:
                marked = {"train": False} if marks_malformed else {}
                answer.append({"role": "assistant", "content": episode.turns[turn].text, **marked})
                ids = []
                continue
            calls = _with_ids(message.get("tool_calls") or [], keeps_ids)
            ids = [call["id"] for call in calls]
            answer.append(_row_message({**message, "tool_calls": calls}))
        elif message["role"] == "tool" and ids:
            answer.append(_row_message({"tool_call_id": ids.pop(0)} | message))
        elif message["role"] == "tool" and is_served:
            answer.append(user(message["content"]))
        else:
            answer.append(_row_message(message))
    return answer


def _is_served(episode: Episode) -> bool:
    """Return True where a server played: its turns have no tokens."""
    return not any(turn.token_ids for turn in episode.turns)


def _with_ids(calls: Sequence[dict[str, Any]], keeps_ids: bool) -> list[dict[str, Any]]:
    """Return calls with ids: their own where they have some and they are kept, else by number."""
    named = []
    for index, call in enumerate(calls):
        call_id = call.get("id") if keeps_ids else None
        named.append({**call, "id": call_id or call_id_at(index)})
    return named


def _row_message(message: Message) -> Message:
    """Return a message with the fields that rows store, and its calls as JSON text in OpenAI's nesting."""
    fields = {name: message[name] for name in ROW_FIELDS if message.get(name)}
    fields["content"] = message.get("content") or ""
    if fields.get("tool_calls"):
        calls = [_with_text(call) for call in _listed(fields["tool_calls"])]
        fields["tool_calls"] = tool_calls(calls, "messages")
    return fields


def _listed(calls: Any) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = json.loads(calls) if isinstance(calls, str) else calls
    return parsed


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with its arguments as JSON text: in an object, fields that are null would be taken for absent."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if not isinstance(arguments, dict):
        return call
    return {"id": call.get("id"), "name": function["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
