"""The turns of a simulated user in a rollout: asked for in batches, and in the journal before anybody sees them.

Torch-free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict

from align.data.rows import Message, Row
from align.environments.errors import EnvironmentFailed
from align.environments.journal import Journal, Position
from align.environments.simulated_user import SimulatedUser, UserAnswer, UserRequest, user_conversation

Waiting = tuple[UserRequest, "Future[str]"]
"""A request, and what gets the text that answers it."""


class UserTurns:
    """The user of all episodes of a rollout. What the journal has is not asked for again."""

    def __init__(self, user: SimulatedUser, read_prompt: Callable[[Row], str], journal: Journal) -> None:
        """``read_prompt`` returns the system message of the user's model for a row."""
        self._user, self._read_prompt, self._journal = user, read_prompt, journal
        self._waiting: dict[int, Waiting] = {}
        """Requests of the next batch, by episode."""
        self._is_busy = False
        """Whether a batch is under way in a thread."""

    @property
    def in_background(self) -> bool:
        """True where the policy samples on while the user answers."""
        return self._user.in_background

    @property
    def waiting(self) -> int:
        """Requests of the next batch."""
        return len(self._waiting)

    @property
    def can_send(self) -> bool:
        """True where requests wait, and none are being answered."""
        return bool(self._waiting) and not self._is_busy

    def ask(self, episode: int, turn: int, row: Row, messages: Sequence[Message], seed: int) -> Future[str]:
        """Ask for what the user says after ``turn`` turns of the policy, in the conversation ``messages``.

        It is answered at once where the journal has it, else with the next batch. The result raises
        ``EnvironmentFailed`` where the user said nothing that the episode could go on with.
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
        """Have all that waits answered as one batch: by the time this returns, or in a thread."""
        # By episode: rows of a batch in another order would round its sums in another way.
        batch = [self._waiting[episode] for episode in sorted(self._waiting)]
        self._waiting.clear()
        if not self.in_background:
            _hand_out(batch, self._answer(batch))
            return
        self._is_busy = True
        # A daemon: an endpoint that is waited for must not keep a process that has failed.
        threading.Thread(target=self._answer_in_thread, args=(batch,), name="simulated user", daemon=True).start()

    def _answer(self, batch: Sequence[Waiting]) -> list[UserAnswer]:
        """Ask the model, and write its answers down."""
        answers = self._user.answer([request for request, _ in batch])
        self._journal.put_all(
            (Position("user", request.episode, request.turn), asdict(answer))
            for (request, _), answer in zip(batch, answers, strict=True)
        )
        return answers

    def _answer_in_thread(self, batch: Sequence[Waiting]) -> None:
        failure: BaseException | None = None
        answers: list[UserAnswer] = []
        try:
            answers = self._answer(batch)
        except BaseException as error:  # whoever waits for the answers raises it
            failure = error
        # First, so that whoever is woken by an answer can send the next batch.
        self._is_busy = False
        if failure is None:
            _hand_out(batch, answers)
            return
        for _, future in batch:
            future.set_exception(failure)


def _hand_out(batch: Sequence[Waiting], answers: Sequence[UserAnswer]) -> None:
    for (_, future), answer in zip(batch, answers, strict=True):
        _settle(future, answer)


def _settle(future: Future[str], answer: UserAnswer) -> None:
    if answer.failure:
        future.set_exception(EnvironmentFailed(answer.failure))
    else:
        future.set_result(answer.text)
