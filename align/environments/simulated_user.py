"""A user that a model plays: its view of a conversation, its answers, and its turns in a rollout. Torch-free.

The models are in ``user_models.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from align.data.final_answers import hide_thoughts
from align.data.rows import Message, Row, assistant, user
from align.environments.journal import Journal, Position
from align.environments.results import EnvironmentFailed, clean

GREETING = "Hi! How can I help you today?"
"""The policy's first message if the user speaks first, because most chat templates begin with a user's message."""
SWAPPED = {"user": assistant, "assistant": user}
"""Makes a message for the user's model, by the role in the policy's conversation."""


@dataclass(frozen=True)
class UserRequest:
    """A request for a turn of the user."""

    episode: int
    turn: int
    """Number of the policy's turns before it."""
    messages: list[Message]
    """The conversation as the user's model reads it."""
    seed: int
    """Seed of the answer, a non-negative int64."""


@dataclass(frozen=True)
class UserAnswer:
    """An answer of the user, or the reason why the episode cannot continue."""

    text: str = ""
    failure: str = ""


Waiting = tuple[UserRequest, "Future[str]"]
"""A request, and the future of its answer."""


class SimulatedUser(Protocol):
    """A model that plays the user of many episodes."""

    @property
    def in_background(self) -> bool:
        """True if the model runs elsewhere, so the policy continues to sample while it answers."""
        ...

    def load(self) -> None:
        """Load the weights once, if the model runs in this process."""
        return

    def answer(self, requests: Sequence[UserRequest]) -> list[UserAnswer]:
        """Return an answer to each request, in their order.

        Raises ``UserError`` if the settings make answers impossible.
        """
        ...

    def usage(self) -> dict[str, Any]:
        """Return requests, tokens and cost of a server; empty for a model in this process."""
        return {}

    def close(self) -> None:
        """Free the model."""
        return


def user_conversation(system: str, messages: Sequence[Message]) -> list[Message]:
    """Return a policy's conversation as the user's model reads it, below its own system message.

    The roles are swapped: the policy's turns are the messages that the model answers. The conversation does not contain
    the policy's system message, its thoughts, its turns that call tools (also malformed calls), and their results.
    Consecutive texts of one side are joined.
    """
    swapped: list[Message] = []
    for index, message in enumerate(messages):
        role = str(message["role"])
        # A turn with only malformed calls has no calls, but a tool's message follows it.
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


def read_answer(text: str, has_end: bool, stop: str | None) -> UserAnswer:
    """Return the answer in a model's text, without thoughts; ``stop`` is the text that ends conversations.

    An answer fails if it is empty, or if it was cut off before ``stop``.
    """
    answer = hide_thoughts(clean(text)).strip()
    if stop is not None and stop in answer:
        return UserAnswer(answer)
    if not has_end:
        return UserAnswer(failure="the user's answer was cut off at its max_tokens; raise user.max_tokens.")
    if not answer:
        return UserAnswer(failure="the user's answer is empty.")
    return UserAnswer(answer)


class UserTurns:
    """The user of all episodes of a rollout. A turn in the journal is not requested again."""

    def __init__(self, user: SimulatedUser, read_prompt: Callable[[Row], str], journal: Journal) -> None:
        """``read_prompt`` returns the system message of the user's model for a row."""
        self._user = user
        self._read_prompt = read_prompt
        self._journal = journal
        self._waiting: dict[int, Waiting] = {}
        """Requests of the next batch, by episode."""
        self._is_busy = False
        """True while a thread waits for a batch."""

    @property
    def in_background(self) -> bool:
        """True if the policy continues to sample while the user answers."""
        return self._user.in_background

    @property
    def waiting(self) -> int:
        """Requests of the next batch."""
        return len(self._waiting)

    @property
    def can_send(self) -> bool:
        """True if requests wait, and no batch is being answered."""
        return bool(self._waiting) and not self._is_busy

    def ask(self, episode: int, turn: int, row: Row, messages: Sequence[Message], seed: int) -> Future[str]:
        """Request the user's answer after ``turn`` turns of the policy, in the conversation ``messages``.

        An answer in the journal is returned immediately; other requests wait for the next batch. The result raises
        ``EnvironmentFailed`` if the episode cannot continue with the answer.
        """
        future: Future[str] = Future()
        stored = self._journal.get("user", episode, turn)
        if stored is None:
            conversation = user_conversation(self._read_prompt(row), messages)
            self._waiting[episode] = (UserRequest(episode, turn, conversation, seed), future)
        else:
            _settle(future, UserAnswer(**stored))
        return future

    def send(self) -> None:
        """Send the waiting requests as one batch. A user in the background answers later, in a thread."""
        # Sort by episode, because another order of rows in a batch changes the rounding.
        batch = [self._waiting[episode] for episode in sorted(self._waiting)]
        self._waiting.clear()
        if not self.in_background:
            _hand_out(batch, self._answer(batch))
            return
        self._is_busy = True
        # A daemon thread, so a slow endpoint cannot keep a failed process alive.
        threading.Thread(target=self._answer_in_thread, args=(batch,), name="simulated user", daemon=True).start()

    def _answer(self, batch: Sequence[Waiting]) -> list[UserAnswer]:
        """Ask the model, and add its answers to the journal."""
        answers = self._user.answer([request for request, _ in batch])
        self._journal.put_all(
            (Position("user", request.episode, request.turn), asdict(answer))
            for (request, _), answer in zip(batch, answers, strict=True)
        )
        return answers

    def _answer_in_thread(self, batch: Sequence[Waiting]) -> None:
        # The thread is not busy any more before an answer wakes another thread, which may send the next batch.
        try:
            answers = self._answer(batch)
        except BaseException as error:
            self._is_busy = False
            for _, future in batch:
                future.set_exception(error)
        else:
            self._is_busy = False
            _hand_out(batch, answers)


def _hand_out(batch: Sequence[Waiting], answers: Sequence[UserAnswer]) -> None:
    for (_, future), answer in zip(batch, answers, strict=True):
        _settle(future, answer)


def _settle(future: Future[str], answer: UserAnswer) -> None:
    if answer.failure:
        future.set_exception(EnvironmentFailed(answer.failure))
    else:
        future.set_result(answer.text)
