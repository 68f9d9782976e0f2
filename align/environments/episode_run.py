"""The course of one episode: its next action, and the effect of each result. No code here waits or runs tools.

``player.py`` executes the actions of many episodes at the same time. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from align.config.environment import EnvironmentConfig
from align.data.call_values import ToolCall
from align.data.rows import Message, user
from align.data.tool_calls import ParsedTurn, ToolCallFormat
from align.environments.episode import CallRecord, Episode, PolicyTurn, failed_episode, scored_messages
from align.environments.results import Scores, Step

Method = Literal["reset", "call", "step", "user", "score"]
Conversation = Callable[[list[Message]], list[Message]]
"""Adds messages to the messages that begin an episode."""


class Turns(Protocol):
    """The part of ``TurnTemplate`` that an episode needs."""

    @property
    def eos(self) -> int: ...

    def prompt(self, messages: list[Message]) -> list[int]: ...

    def between(
        self, messages: list[Message], calls: Sequence[ToolCall] = (), prompt: Sequence[Message] = ()
    ) -> list[int]: ...


class PromptedTurns:
    """Turns with messages that ``conversation`` adds to the prompt; the episode's messages do not contain them."""

    def __init__(self, turns: Turns, conversation: Conversation) -> None:
        self.turns = turns
        self.conversation = conversation
        self.eos = turns.eos

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return the ids of the prompt, including the added messages."""
        return self.turns.prompt(self.conversation(messages))

    def between(
        self, messages: list[Message], calls: Sequence[ToolCall] = (), prompt: Sequence[Message] = ()
    ) -> list[int]:
        """Return the ids that follow a sampled turn."""
        return self.turns.between(messages, calls, self.conversation(list(prompt)))


def with_system(system: str | None) -> Conversation:
    """Return a function that adds ``system``, unless it is None or the messages have a system message."""

    def add(messages: list[Message]) -> list[Message]:
        if system is None or (messages and messages[0]["role"] == "system"):
            return messages
        return [{"role": "system", "content": system}, *messages]

    return add


@dataclass(frozen=True)
class UserRules:
    """Settings of a simulated user, which all episodes share."""

    stop: str | None
    """Text with which the user ends the conversation."""
    opens: bool
    """True if the user speaks first."""


@dataclass(frozen=True)
class EpisodeRules:
    """Settings that all episodes of a stage share."""

    turns: Turns
    call_format: ToolCallFormat | None
    """Parses the calls in a turn; None if there are no tools."""
    decode: Callable[[list[int]], str]
    """Returns the text of token ids, including special tokens."""
    shorten: Callable[[str], str]
    """Returns a tool's result as the model reads it, cut if it is too long."""
    has_step: bool
    """True if the environment answers turns without calls."""
    max_turns: int
    max_tokens: int
    """Tokens of an episode after its prompt, including the environment's tokens."""
    turn_max_tokens: int
    max_prompt_tokens: int
    user: UserRules | None = None
    """The simulated user, which answers turns without calls; None if there is none."""


def limits(config: EnvironmentConfig, has_step: bool) -> dict[str, Any]:
    """Return the fields of ``EpisodeRules`` that follow from an ``environment`` block and its environment."""
    return {
        "has_step": has_step,
        "max_turns": config.max_turns,
        "max_tokens": config.max_tokens,
        "turn_max_tokens": config.turn_max_tokens or config.max_tokens,
        "user": None if config.user is None else UserRules(config.user.stop, config.user.opens),
    }


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
    """A running episode. ``action`` is its next action, None once it is over."""

    row: dict[str, Any]
    seed: int
    rules: EpisodeRules
    opening_seed: int | None = None
    """Seed of a user who speaks first; None for the episode's seed."""
    episode: Episode = field(default_factory=lambda: Episode([]))
    action: Action | None = None
    _first_messages: list[Message] = field(default_factory=list)
    """Messages of the prompt. In some templates the system message determines how turns begin."""
    _calls: deque[ToolCall] = field(default_factory=deque)
    """Calls of the last turn that have not been made."""
    _turn_calls: list[ToolCall] = field(default_factory=list)
    """All calls of the last turn."""
    _results: list[Message] = field(default_factory=list)
    """Results of the last turn's calls so far."""

    def __post_init__(self) -> None:
        self.action = Act("reset", 0, 0, (self.row,))

    # ---- the policy's turns ----

    def take_turn(self, turn: PolicyTurn) -> None:
        """Add a sampled turn, and choose the next action."""
        episode = self.episode
        episode.turns.append(turn)
        if not turn.finished:
            # A turn without its end cannot be continued, so the episode is truncated here.
            self._add_message({"role": "assistant", "content": turn.marked_text})
            self._end("truncated")
            return
        parsed = self._parse(turn)
        if parsed is None or not (parsed.calls or parsed.errors):
            self._add_message({"role": "assistant", "content": turn.marked_text})
            self._after_words(turn)
            return
        calls = [describe_call(call) for call in parsed.calls]
        content = turn.marked_thought + parsed.content
        self._add_message({"role": "assistant", "content": content, "tool_calls": calls})
        if self._is_last_turn:
            # No later turn could read the results.
            self._record_errors(parsed.errors)
            self._end("max_turns")
            return
        # Calls run in order. The policy reads all results together.
        self._turn_calls = list(parsed.calls)
        self._calls = deque(parsed.calls)
        self._results = []
        self._record_errors(parsed.errors)
        self._next_call()

    def _parse(self, turn: PolicyTurn) -> ParsedTurn | None:
        if self.rules.call_format is None:
            return None
        # Calls inside a thought are not made.
        return self.rules.call_format.parse(self.rules.decode(turn.token_ids[turn.thought_tokens : -1]))

    def _after_words(self, turn: PolicyTurn) -> None:
        """Continue after a turn without calls: the environment or a user answers it, or the episode is over."""
        number = len(self.episode.turns) - 1
        if self.rules.has_step:
            self.action = Act("step", number, 0, (str(turn.answer_text),))
        elif self.rules.user is None:
            self._end("finished")
        elif self._is_last_turn and self.rules.user.stop is None:
            # A user without a stop text speaks until the last turn, so the conversation is complete.
            self._end("finished")
        else:
            self._ask_user()

    def _record_errors(self, errors: Sequence[str]) -> None:
        """Answer the calls of a turn that could not be read."""
        for error in errors:
            self._answer("", {}, error, "malformed")

    # ---- calls ----

    def _next_call(self) -> None:
        """Make the next call of the last turn; after the last call, let the policy read the results."""
        if not self._calls:
            self._observe(self._results, self._turn_calls)
            return
        call = self._calls[0]
        index = len(self._turn_calls) - len(self._calls)
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
        """Continue with the user's answer."""
        assert self.rules.user is not None
        self.episode.user_answers.append(answer)
        # Text after the stop text is dropped.
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
        """Continue with the result of the last ``Act``."""
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
        """Begin with the environment's messages or the row's prompt; a user who speaks first adds a message."""
        if messages is None:
            messages = row_messages(self.row)
        if self.rules.user is None or not self.rules.user.opens:
            self._start(messages)
            return
        # The user's first message replaces the question of the row.
        self.episode.messages = [message for message in messages if message["role"] == "system"]
        self._ask_user()

    def _start(self, messages: list[Message]) -> None:
        """Render the prompt, and ask for the policy's first turn."""
        self._first_messages = messages
        self.episode.messages = list(messages)
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
        episode.score = scores.total
        episode.parts = scores.parts
        episode.turn_scores = scores.turns
        self.action = None

    def _end(self, stop: Literal["finished", "truncated", "max_turns"]) -> None:
        self.episode.stop = stop
        self.action = Act("score", len(self.episode.turns) - 1, 0, (scored_messages(self.episode),))

    def fail(self, reason: str) -> None:
        """End the episode because its environment failed."""
        if self.episode.turns:
            self.episode.stop = "failed"
            self.episode.failure = reason
        else:
            # No turn was sampled, but a rollout needs a token for every response.
            messages = self.episode.messages
            self.episode = failed_episode(self.episode.prompt_ids, self.rules.turns.eos, reason)
            self.episode.messages = messages
        self.action = None

    def _add_message(self, message: Message) -> None:
        self.episode.messages.append(message)


def describe_call(call: ToolCall) -> dict[str, Any]:
    """Return a call in the format of messages; it has an id only if the policy gave one."""
    identity = {"id": call.id} if call.id else {}
    return {**identity, "name": call.name, "arguments": call.arguments}


def row_messages(row: dict[str, Any]) -> list[Message]:
    """Return the messages of a row's prompt; a text becomes a user's message."""
    prompt = row.get("prompt")
    return list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": str(prompt or "")}]


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a turn, a non-negative int64 that depends only on the episode's seed and the turn."""
    return _seed(f"{seed}/turn/{turn}")


def user_seed(seed: int, turn: int) -> int:
    """Return the seed of a simulated user's answer after ``turn`` turns of the policy, a non-negative int64."""
    return _seed(f"{seed}/user/{turn}")


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
