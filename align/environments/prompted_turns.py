"""Turns of a policy whose prompts have messages of a stage's own before the environment's. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from align.data.tool_calls import ToolCall
from align.environments.episode import Message
from align.environments.episode_run import Turns

Conversation = Callable[[list[Message]], list[Message]]
"""Adds messages to those that begin an episode."""


class PromptedTurns:
    """Turns whose prompts are rendered as ``conversation`` returns them; the episode's messages lack what it adds."""

    def __init__(self, turns: Turns, conversation: Conversation) -> None:
        self.turns, self.conversation = turns, conversation
        self.eos = turns.eos

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return the ids of the prompt, the added messages included."""
        return self.turns.prompt(self.conversation(messages))

    def between(
        self, messages: list[Message], calls: Sequence[ToolCall] = (), prompt: Sequence[Message] = ()
    ) -> list[int]:
        """Return the ids that follow a sampled turn."""
        return self.turns.between(messages, calls, self.conversation(list(prompt)))


def with_system(system: str | None) -> Conversation:
    """Return a function that puts a system message before messages that have none; none where ``system`` is None."""

    def add(messages: list[Message]) -> list[Message]:
        if system is None or (messages and messages[0]["role"] == "system"):
            return messages
        return [{"role": "system", "content": system}, *messages]

    return add
