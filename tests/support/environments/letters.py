"""Rules of episodes whose tokens are letters, for tests without a model."""

from __future__ import annotations

from typing import Any

from align.data.tool_calls import tool_call_format
from align.environments.episode_run import EpisodeRules

EOS = 9


class Letters:
    """Tokens are code points, and a message is its content in brackets."""

    eos = EOS

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the code points of the prompt."""
        return [ord(character) for message in messages for character in message["content"]]

    def between(self, messages: list[dict[str, Any]], calls: Any = (), prompt: Any = ()) -> list[int]:
        """Return the code points of new messages."""
        return [ord(character) for message in messages for character in f"<{message['content']}>"]


def letter_rules(**changes: Any) -> EpisodeRules:
    """Return rules with tools and small limits, and ``changes`` to them."""
    fields: dict[str, Any] = {
        "turns": Letters(),
        "call_format": tool_call_format("hermes"),
        "decode": lambda ids: "".join(map(chr, ids)),
        "shorten": lambda result: result[:80],
        "has_step": False,
        "max_turns": 3,
        "max_tokens": 400,
        "turn_max_tokens": 100,
        "max_prompt_tokens": 20,
    }
    return EpisodeRules(**(fields | changes))
