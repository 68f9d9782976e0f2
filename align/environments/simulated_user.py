"""A user that a model plays: what it reads of a conversation, and what it answers. Torch-free.

Leaves out the models (``checkpoint_user.py``, ``endpoint_user.py``) and when they are asked (``user_turns.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from align.data.rows import Message, assistant, user
from align.data.thoughts import hide_thoughts
from align.environments.results import clean

GREETING = "Hi! How can I help you today?"
"""What the policy is said to have begun with, where the user speaks first: most chat templates begin with a user."""
SWAPPED = {"user": assistant, "assistant": user}
"""Makes the message that the user's model reads, by the role in the policy's conversation."""


@dataclass(frozen=True)
class UserRequest:
    """A turn of the user that is asked for."""

    episode: int
    turn: int
    """Turns of the policy before it."""
    messages: list[Message]
    """The conversation as the user's model reads it."""
    seed: int
    """Seed of the answer, a non-negative int64."""


@dataclass(frozen=True)
class UserAnswer:
    """What the user said; or why it said nothing that the episode could go on with."""

    text: str = ""
    failure: str = ""


class SimulatedUser(Protocol):
    """A model that plays the user of many episodes."""

    @property
    def in_background(self) -> bool:
        """True where the model is elsewhere, so that the policy samples on while it answers."""
        ...

    def load(self) -> None:
        """Load the weights, where they are in this process, unless that was done."""
        ...

    def answer(self, requests: Sequence[UserRequest]) -> list[UserAnswer]:
        """Return an answer to each request, in their order.

        Raises ``UserError`` for settings with which none can be answered.
        """
        ...

    def usage(self) -> dict[str, Any]:
        """Return requests, tokens and cost of a server; nothing for a model in this process."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def user_conversation(system: str, messages: Sequence[Message]) -> list[Message]:
    """Return a policy's conversation as the user's model reads it, below its own system message.

    The roles are swapped: the policy's turns are the messages that the model answers. Left out are the policy's system
    message, its thoughts, its turns that call tools, malformed calls too, and their results. Texts of one side in a row
    are joined.
    """
    swapped: list[Message] = []
    for index, message in enumerate(messages):
        role = str(message["role"])
        # A turn whose calls are all malformed has none; what answers it is a tool's all the same.
        following = messages[index + 1 : index + 2]
        has_calls = message.get("tool_calls") or any(answer["role"] == "tool" for answer in following)
        if role not in SWAPPED or (role == "assistant" and has_calls):
            continue
        text = str(message.get("content") or "")
        if role == "assistant":
            text = hide_thoughts(text).strip()
        turn = SWAPPED[role](text)
        if swapped and swapped[-1]["role"] == turn["role"]:
            joined = f"{swapped[-1]['content']}\n\n{turn['content']}".strip()
            swapped[-1] = turn | {"content": joined}
        else:
            swapped.append(turn)
    if not swapped or swapped[0]["role"] == "assistant":
        swapped.insert(0, user(GREETING))
    return [{"role": "system", "content": system}, *swapped]


def read_answer(text: str, finished: bool, stop: str | None) -> UserAnswer:
    """Return the answer in a model's text: without a thought, and whole. ``stop`` is the text that ends conversations.

    One that is empty, or was cut off before it said ``stop``, is a failure.
    """
    answer = hide_thoughts(clean(text)).strip()
    if stop is not None and stop in answer:
        return UserAnswer(answer)
    if not finished:
        return UserAnswer(failure="the user's answer was cut off at its max_tokens; raise user.max_tokens.")
    if not answer:
        return UserAnswer(failure="the user's answer is empty.")
    return UserAnswer(answer)
