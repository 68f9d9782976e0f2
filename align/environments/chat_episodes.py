"""Episodes of a model behind a chat API: it reads messages and tools, and returns text and calls, never token ids.

Environments, journal and course of an episode are the same as for sampled episodes. A request for the policy's turn
contains the conversation, and the server counts the tokens. Such episodes become rows; training on their tokens is
impossible. The client is ``align.inference.endpoint_client``. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from align.config.environment import EnvironmentConfig
from align.data.call_values import MalformedCall, ToolCall, call_from_json
from align.data.final_answers import split_thought
from align.data.rows import Message
from align.data.tool_calls import ParsedTurn
from align.environments.episode import Episode, PolicyTurn, dialogue
from align.environments.episode_run import EpisodeRules, EpisodeRun, SampleTurn, limits
from align.environments.journal import Journal, Position
from align.environments.player import EpisodePlayer, EpisodeTask
from align.environments.results import cut_text
from align.inference.protocol import Response, Session, TurnRequest
from align.inference.requests import Answer, Request

ANSWER = "answer"
"""Kind of the journal's entries with the server's answers."""
CHARACTERS_PER_TOKEN = 4
"""Characters of a result for each token of its limit: only the server knows its tokens."""

MakeRequest = Callable[[list[Message], int, int], Request]
"""A function from a conversation, the most tokens of its answer and the episode's seed to the request."""
Ask = Callable[[list[Request]], list[Answer]]
"""A function from requests to their answers."""


@dataclass(frozen=True)
class ChatTurn(PolicyTurn):
    """A turn that a server returned: ``token_ids`` and ``logprobs`` are empty."""

    calls: list[ToolCall] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """One sentence for each call that is malformed."""
    prompt_tokens: int | None = None
    """Tokens of the conversation before the turn, as the server counts them; None if it does not."""
    completion_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that were sampled; 0 if the server does not count them."""
        return self.completion_tokens or 0


def read_turn(answer: Answer) -> ChatTurn:
    """Return the turn in an answer.

    No call of a turn is made if one call is malformed, because a server refuses calls without results.
    """
    calls = []
    errors = []
    for call in answer.tool_calls:
        try:
            calls.append(call_from_json(call, ""))
        except MalformedCall as error:
            errors.append(f"A tool call {error}. No call of this turn was made.")
    text = answer.text
    if errors:
        written = [f"{call['name']}({call['arguments']})" for call in answer.tool_calls]
        text = "\n".join([text, *written]).strip()
        calls = []
    spoken = split_thought(text)
    return ChatTurn(
        thought_end=len(spoken.thought),
        is_open=spoken.is_open,
        token_ids=[],
        logprobs=[],
        finished=answer.finished,
        text=text,
        calls=calls,
        errors=errors,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
    )


@dataclass
class ChatRun(EpisodeRun):
    """One episode under way, whose turns are ``ChatTurn``."""

    def _parse(self, turn: PolicyTurn) -> ParsedTurn | None:
        assert isinstance(turn, ChatTurn)
        return ParsedTurn(str(turn.answer_text), turn.calls, turn.errors)

    def _ask(self) -> None:
        turn = len(self.episode.turns)
        room = self.rules.max_tokens - self._spent()
        if room < 1:
            self._end("truncated")
            return
        self.action = SampleTurn(turn, [], min(self.rules.turn_max_tokens, room), self.seed)

    def _spent(self) -> int:
        """Count the tokens after the prompt up to the last turn, as far as the server tells."""
        turns = [turn for turn in self.episode.turns if isinstance(turn, ChatTurn)]
        if not turns:
            return 0
        first = turns[0].prompt_tokens
        last = turns[-1].prompt_tokens
        if first is None or last is None:
            return sum(turn.tokens for turn in turns)
        # The last prompt contains everything before it, so its growth counts all turns and results in between.
        return last - first + turns[-1].tokens

    def fail(self, reason: str) -> None:
        """End the episode because its environment, or a request, failed."""
        self.episode.stop = "failed"
        self.episode.failure = reason
        self.action = None


class NoTokens:
    """The ``Turns`` of episodes without token ids."""

    eos = -1

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return no ids."""
        return []

    def between(
        self, messages: list[Message], calls: Sequence[ToolCall] = (), prompt: Sequence[Message] = ()
    ) -> list[int]:
        """Return no ids."""
        return []


@dataclass(frozen=True)
class ChatResponse(Response):
    """A server's answer to a turn."""

    answer: Answer = field(kw_only=True)


class ChatSession(Session):
    """Asks for all turns of a round at once. Answers are in the journal before they are used.

    A resumed stage reads them from the journal, whose calls belong to exactly these answers.
    """

    is_lockstep = True

    def __init__(self, make_request: MakeRequest, ask: Ask, journal: Journal) -> None:
        self._make_request = make_request
        self._ask = ask
        self._journal = journal
        self.conversation: Callable[[int], tuple[list[Message], int, int]]
        """A function from the number of an episode to its conversation, its next turn and its seed."""
        self._limits: dict[int, int] = {}
        """Most tokens of the turns that were submitted, by episode."""

    @property
    def pending(self) -> int:
        """Turns that the next ``poll`` asks for."""
        return len(self._limits)

    def submit(self, request: TurnRequest) -> None:
        """Keep a turn for the next ``poll``, which reads its conversation."""
        self._limits[request.key] = request.max_tokens

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """Return an answer to every turn that was submitted, whatever the timeout."""
        places: list[Position] = []
        requests: list[Request] = []
        # Sort by episode, so the requests do not depend on the speed of tools.
        for key, limit in sorted(self._limits.items()):
            messages, turn, seed = self.conversation(key)
            places.append(Position(ANSWER, key, turn))
            requests.append(self._make_request(messages, limit, seed))
        self._limits.clear()
        stored = [self._journal.find(place) for place in places]
        # Requests with an answer in the journal are also sent: the stage's cache answers them and counts their cost.
        answers = [
            answer if entry is None else Answer(**entry)
            for answer, entry in zip(self._ask(requests), stored, strict=True)
        ]
        self._journal.put_all(
            (place, asdict(answer))
            for place, answer, entry in zip(places, answers, stored, strict=True)
            # A request that failed is sent again by the next attempt.
            if entry is None and not answer.error
        )
        return [
            (place.episode, ChatResponse([], [], answer.finished, answer.text, answer=answer))
            for place, answer in zip(places, answers, strict=True)
        ]

    def close(self) -> None:
        """Drop what was submitted."""
        self._limits.clear()


@dataclass
class ChatPlayer(EpisodePlayer):
    """Plays episodes with a ``ChatSession``."""

    def play(self, tasks: Sequence[EpisodeTask]) -> list[Episode]:
        """Return an episode for each task, in order."""
        assert isinstance(self.session, ChatSession)
        self.session.conversation = self._conversation
        return super().play(tasks)

    def _make_run(self, task: EpisodeTask) -> EpisodeRun:
        return ChatRun(task.row, task.seed, self.rules, task.opening_seed)

    def _conversation(self, index: int) -> tuple[list[Message], int, int]:
        run = self._runs[index]
        return dialogue(run.episode), len(run.episode.turns), run.seed

    def _take_turns(self, responses: list[tuple[int, Response]]) -> None:
        for index, response in responses:
            assert isinstance(response, ChatResponse)
            run = self._runs[index]
            answer = response.answer
            if answer.error or answer.refused:
                run.fail(f"request: {answer.error or 'the endpoint refused to answer.'}")
            else:
                run.take_turn(read_turn(answer))
            self._advance(index)


def chat_rules(config: EnvironmentConfig, has_step: bool) -> EpisodeRules:
    """Return the rules of an ``EnvironmentConfig``'s episodes for a server."""
    return EpisodeRules(
        turns=NoTokens(),
        call_format=None,
        decode=lambda ids: "",
        shorten=lambda result: cut_text(result, CHARACTERS_PER_TOKEN * config.max_result_tokens),
        max_prompt_tokens=0,
        **limits(config, has_step),
    )
