"""The course of one episode: what it asks for next, and what it makes of the outcome. Nothing here waits or runs tools.

``player.py`` carries the actions out, for many episodes at a time. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from align.data.rows import user
from align.data.tool_calls import ParsedTurn, ToolCall, ToolCallFormat
from align.environments.episode import CallRecord, Episode, Message, PolicyTurn, failed_episode
from align.environments.results import Scores, Step

Method = Literal["reset", "call", "step", "user", "score"]


class Turns(Protocol):
    """The part of ``TurnTemplate`` that an episode needs."""

    @property
    def eos(self) -> int: ...

    def prompt(self, messages: list[Message]) -> list[int]: ...

    def between(
        self, messages: list[Message], calls: Sequence[ToolCall] = (), prompt: Sequence[Message] = ()
    ) -> list[int]: ...


@dataclass(frozen=True)
class UserRules:
    """The part of a simulated user that is the same for all episodes."""

    stop: str | None
    """Text by which it ends the conversation."""
    opens: bool
    """True where it speaks first."""


@dataclass(frozen=True)
class EpisodeRules:
    """What is the same for all episodes of a stage."""

    turns: Turns
    call_format: ToolCallFormat | None
    """Reads the calls in a turn; None where there are no tools."""
    decode: Callable[[list[int]], str]
    """Returns the text of token ids, special tokens included."""
    shorten: Callable[[str], str]
    """Returns a result of a tool as the model reads it, cut where it is too long."""
    has_step: bool
    """True where the environment answers turns without calls."""
    max_turns: int
    max_tokens: int
    """Tokens of an episode after its prompt, those of its environment included."""
    turn_max_tokens: int
    max_prompt_tokens: int
    user: UserRules | None = None
    """The simulated user that answers turns without calls; None where there is none."""


@dataclass(frozen=True)
class SampleTurn:
    """Ask the engine for the policy's next turn."""

    turn: int
    prompt: list[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Act:
    """Call a method of the environment, or ask the simulated user (``user``)."""

    method: Method
    turn: int
    index: int
    """Number among the calls of the turn."""
    arguments: tuple[Any, ...]


Action = SampleTurn | Act


@dataclass
class EpisodeRun:
    """One episode under way. ``action`` is what it needs next, None once it is over."""

    row: dict[str, Any]
    seed: int
    rules: EpisodeRules
    opening_seed: int | None = None
    """Seed of a user who speaks first; None for the episode's own."""
    episode: Episode = field(default_factory=lambda: Episode([]))
    action: Action | None = None
    _first_messages: list[Message] = field(default_factory=list)
    """Messages of the prompt: some templates begin every turn as their system message says."""
    _calls: deque[ToolCall] = field(default_factory=deque)
    """Calls of the last turn that are still to be made."""
    _turn_calls: list[ToolCall] = field(default_factory=list)
    """All calls of the last turn."""
    _results: list[Message] = field(default_factory=list)
    """Answers to the calls of the last turn so far."""

    def __post_init__(self) -> None:
        self.action = Act("reset", 0, 0, (self.row,))

    # ---- the policy's turns ----

    def take_turn(self, turn: PolicyTurn) -> None:
        """Add a sampled turn, and decide what follows it."""
        episode = self.episode
        episode.turns.append(turn)
        if not turn.finished:
            # Its end is missing, so nothing can follow it: the episode was cut off here.
            self._add_message({"role": "assistant", "content": turn.text})
            self._end("truncated")
            return
        parsed = self._parse(turn)
        if parsed is None or not (parsed.calls or parsed.errors):
            self._add_message({"role": "assistant", "content": turn.text})
            self._after_words(turn)
            return
        calls = [describe_call(call) for call in parsed.calls]
        self._add_message({"role": "assistant", "content": parsed.content, "tool_calls": calls})
        if self._is_last_turn:
            # Nobody would read the results.
            self._record_errors(parsed.errors)
            self._end("max_turns")
            return
        # Calls run one after another. The policy reads all results together.
        self._turn_calls, self._calls, self._results = list(parsed.calls), deque(parsed.calls), []
        self._record_errors(parsed.errors)
        self._next_call()

    def _parse(self, turn: PolicyTurn) -> ParsedTurn | None:
        if self.rules.call_format is None:
            return None
        return self.rules.call_format.parse(self.rules.decode(turn.token_ids[:-1]))

    def _after_words(self, turn: PolicyTurn) -> None:
        """Go on after a turn without calls: the environment or a user answers it, or the episode is over."""
        number = len(self.episode.turns) - 1
        if self.rules.has_step:
            self.action = Act("step", number, 0, (turn.text,))
        elif self.rules.user is None:
            self._end("finished")
        elif self._is_last_turn and self.rules.user.stop is None:
            # A user without a word for the end speaks until the last turn: this is the whole conversation.
            self._end("finished")
        else:
            self._ask_user()

    def _record_errors(self, errors: Sequence[str]) -> None:
        """Answer the calls of a turn that could not be read."""
        for error in errors:
            self._answer("", {}, error, "malformed")

    # ---- calls ----

    def _next_call(self) -> None:
        """Make the next call of the last turn; after the last one, let the policy read the results."""
        if not self._calls:
            self._observe(self._results, self._turn_calls)
            return
        call, index = self._calls[0], len(self._turn_calls) - len(self._calls)
        self.action = Act("call", len(self.episode.turns) - 1, index, (call.name, call.arguments))

    def _answer(self, name: str, arguments: dict[str, Any], result: str, error: Any = "", seconds: float = 0.0) -> None:
        """Record a call and the text that answers it."""
        turn = len(self.episode.turns) - 1
        self.episode.calls.append(CallRecord(turn, name, arguments, result, error, seconds))
        content = f"Error: {result}" if error else result
        self._results.append({"role": "tool", "content": content} | ({"name": name} if name else {}))

    def _observe(self, messages: list[Message], calls: Sequence[ToolCall] = ()) -> None:
        """Let the policy read messages, and ask for its next turn."""
        for message in messages:
            self._add_message(message)
        ids = self.rules.turns.between(messages, calls, self._first_messages)
        # Without room for a token of the answer the policy could not react.
        if self.episode.length + len(ids) >= self.rules.max_tokens:
            self._end("truncated")
            return
        self.episode.observations.append(ids)
        self._ask()

    def _ask(self) -> None:
        turn = len(self.episode.turns)
        room = self.rules.max_tokens - self.episode.length
        self.action = SampleTurn(
            turn, self.episode.context_ids(), min(self.rules.turn_max_tokens, room), turn_seed(self.seed, turn)
        )

    @property
    def _is_last_turn(self) -> bool:
        return len(self.episode.turns) == self.rules.max_turns

    # ---- a simulated user ----

    def _ask_user(self) -> None:
        """Ask the user for its next turn, with the conversation and a seed."""
        turn = len(self.episode.turns)
        seed = self.seed
        if turn == 0 and self.opening_seed is not None:
            seed = self.opening_seed
        self.action = Act("user", turn, 0, (list(self.episode.messages), user_seed(seed, turn)))

    def _take_answer(self, answer: str) -> None:
        """Go on with what the user said."""
        assert self.rules.user is not None
        self.episode.user_answers.append(answer)
        # What the user says after the stop text is dropped.
        text, stop, _ = answer.partition(self.rules.user.stop) if self.rules.user.stop else (answer, "", "")
        messages = [user(self.rules.shorten(text.strip()))] if text.strip() else []
        # A user who speaks first completes the prompt.
        if not self.episode.turns:
            if stop:
                self.fail("user: it ended the conversation before the policy spoke.")
            else:
                self._start([*self.episode.messages, *messages])
        elif stop or self._is_last_turn:
            for message in messages:
                self._add_message(message)
            self._end("finished" if stop else "max_turns")
        else:
            self._observe(messages)

    # ---- the environment's answers ----

    def take_result(self, result: Any) -> None:
        """Go on with what the method of the last ``Act`` returned."""
        act = self.action
        assert isinstance(act, Act)
        if act.method == "reset":
            self._begin(result)
        elif act.method == "call":
            call = self._calls.popleft()
            text = self.rules.shorten(result.text)
            self._answer(call.name, call.arguments, text, result.error, result.seconds)
            self._next_call()
        elif act.method == "step":
            self._take_step(result)
        elif act.method == "user":
            self._take_answer(result)
        else:
            self._take_scores(result)

    def _begin(self, messages: list[Message] | None) -> None:
        """Take the messages that the environment returned, or the row's; a user who speaks first adds its own."""
        if messages is None:
            messages = row_messages(self.row)
        if self.rules.user is None or not self.rules.user.opens:
            self._start(messages)
            return
        # The user's own first words replace the question of the row.
        self.episode.messages = [message for message in messages if message["role"] == "system"]
        self._ask_user()

    def _start(self, messages: list[Message]) -> None:
        """Render the prompt, and ask for the policy's first turn."""
        self._first_messages, self.episode.messages = messages, list(messages)
        ids = self.rules.turns.prompt(messages)
        if len(ids) > self.rules.max_prompt_tokens:
            ids = ids[: self.rules.max_prompt_tokens]
            self.episode = failed_episode(
                ids,
                self.rules.turns.eos,
                f"the prompt is longer than max_prompt_tokens {self.rules.max_prompt_tokens}.",
            )
            self.action = None
            return
        self.episode.prompt_ids = ids
        self._ask()

    def _take_step(self, step: Step) -> None:
        messages = [message | {"content": self.rules.shorten(message["content"])} for message in step.messages]
        if step.done:
            for message in messages:
                self._add_message(message)
            self._end("finished")
        elif self._is_last_turn:
            self._end("max_turns")
        else:
            self._observe(messages)

    def _take_scores(self, scores: Scores) -> None:
        episode = self.episode
        if scores.turns is not None and len(scores.turns) != len(episode.turns):
            self.fail(f"score returned {len(scores.turns)} scores by turn, and the episode has {len(episode.turns)}.")
            return
        episode.score, episode.parts, episode.turn_scores = scores.total, scores.parts, scores.turns
        self.action = None

    def _end(self, stop: Literal["finished", "truncated", "max_turns"]) -> None:
        self.episode.stop = stop
        self.action = Act("score", len(self.episode.turns) - 1, 0, (self.episode.messages,))

    def fail(self, reason: str) -> None:
        """End the episode because its environment failed."""
        if self.episode.turns:
            self.episode.stop, self.episode.failure = "failed", reason
        else:
            # No turn was sampled, but a rollout needs a token for every response.
            messages = self.episode.messages
            self.episode = failed_episode(self.episode.prompt_ids, self.rules.turns.eos, reason)
            self.episode.messages = messages
        self.action = None

    def _add_message(self, message: Message) -> None:
        self.episode.messages.append(message)


def describe_call(call: ToolCall) -> dict[str, Any]:
    """Return a call as messages have it; its id only where the policy gave it one."""
    named = {"id": call.id} if call.id else {}
    return {**named, "name": call.name, "arguments": call.arguments}


def row_messages(row: dict[str, Any]) -> list[Message]:
    """Return the messages of a row's prompt; a text is the user's."""
    prompt = row.get("prompt")
    return list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": str(prompt or "")}]


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a turn, a non-negative int64; it depends on nothing but the episode's seed and the turn."""
    return _seed(f"{seed}/turn/{turn}")


def user_seed(seed: int, turn: int) -> int:
    """Return the seed of what a simulated user says after ``turn`` turns of the policy, as ``turn_seed`` does."""
    return _seed(f"{seed}/user/{turn}")


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
