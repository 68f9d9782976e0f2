"""An episode: the turns of the policy, the environment's text between them, calls and scores. Torch-free.

Token ids travel from the sampler to the loss; text is never tokenized again. ``token_ids``, ``logprobs`` and ``mask``
describe the episode as one response: ``mask`` is True only on the policy's tokens. The functions convert an episode's
conversation for people, servers and the rows of datasets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from align.data.call_values import ToolCall
from align.data.final_answers import AnswerText
from align.data.formats.messages import tool_calls
from align.data.rows import Message, user
from align.inference.protocol import Response
from align.inference.thoughts import thought_facts

ROW_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name")
"""Fields of a message that rows store."""

Stop = Literal["finished", "truncated", "max_turns", "failed"]
"""End of an episode: the model or its environment ended it; a turn or the episode reached its maximum of tokens; it
reached its maximum of turns; or its environment failed."""


@dataclass(frozen=True)
class PolicyTurn(Response):
    """One turn that the policy sampled; ``weights_update`` is None outside of training."""

    @property
    def tokens(self) -> int:
        """Number of tokens that were sampled."""
        return len(self.token_ids)


@dataclass(frozen=True)
class CallRecord:
    """A call of a tool in an episode; it may be malformed."""

    turn: int
    name: str
    """Empty for a call that is malformed."""
    arguments: dict[str, Any]
    result: str
    """Text that answers the model."""
    error: Literal["", "malformed", "arguments", "raised", "timeout"] = ""
    """Kind of the error: a malformed call, a wrong tool or wrong arguments, an exception, or a timeout of the tool."""
    seconds: float = 0.0


@dataclass
class Episode:
    """One episode. ``observations[i]`` are the token ids that follow turn i; the last turn has none."""

    prompt_ids: list[int]
    turns: list[PolicyTurn] = field(default_factory=list)
    observations: list[list[int]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    """The conversation, for people. It is never tokenized."""
    calls: list[CallRecord] = field(default_factory=list)
    user_answers: list[str] = field(default_factory=list)
    """Complete answers of a simulated user in order, including the stop text and any text that was cut."""
    stop: Stop = "finished"
    score: float = math.nan
    """Total of the scores; NaN if the environment failed."""
    parts: dict[str, float] = field(default_factory=dict)
    """Scores by name."""
    turn_scores: list[float] | None = None
    """Score of each turn, which is part of ``score``; None if the environment scores only complete episodes."""
    failure: str = ""
    """Reason why the environment failed."""

    @property
    def token_ids(self) -> list[int]:
        """Ids of all tokens after the prompt, (T,)."""
        return [token for turn, observation in self._pairs() for token in (*turn.token_ids, *observation)]

    @property
    def logprobs(self) -> list[float]:
        """Log-probabilities of ``token_ids``, (T,): 0 on the environment's tokens."""
        logprobs: list[float] = []
        for turn, observation in self._pairs():
            logprobs += turn.logprobs
            logprobs += [0.0] * len(observation)
        return logprobs

    @property
    def weights_updates(self) -> list[int | None]:
        """Update whose weights sampled each of ``token_ids``, (T,); an observation has the update of its turn."""
        updates: list[int | None] = []
        for turn, observation in self._pairs():
            updates += [turn.weights_update] * (len(turn.token_ids) + len(observation))
        return updates

    @property
    def mask(self) -> list[bool]:
        """True on the tokens that the policy sampled, (T,)."""
        mask: list[bool] = []
        for turn, observation in self._pairs():
            mask += [*turn.mask, *([False] * len(observation))]
        return mask

    @property
    def length(self) -> int:
        """Tokens after the prompt."""
        return sum(len(turn.token_ids) + len(observation) for turn, observation in self._pairs())

    @property
    def finished(self) -> bool:
        """True if the last turn ended by itself and no limit ended the episode."""
        return self.stop == "finished"

    @property
    def text(self) -> str:
        """Text of the last turn."""
        return self.turns[-1].text if self.turns else ""

    @property
    def answer_text(self) -> AnswerText:
        """The last turn's text after its thought: the answer that scorers of single responses read."""
        return self.turns[-1].answer_text if self.turns else AnswerText.cut("", 0)

    def _pairs(self) -> list[tuple[PolicyTurn, list[int]]]:
        # The last turn has no observation, so it is paired with an empty observation.
        observations = [*self.observations, *([[]] * (len(self.turns) - len(self.observations)))]
        return list(zip(self.turns, observations, strict=True))

    @property
    def forced(self) -> list[int]:
        """Positions of ``token_ids`` that thinking budgets forced."""
        positions: list[int] = []
        start = 0
        for turn, observation in self._pairs():
            positions += [start + position for position in turn.forced]
            start += len(turn.token_ids) + len(observation)
        return positions

    @property
    def thought_tokens(self) -> int:
        """Tokens of the thoughts of all turns."""
        return sum(turn.thought_tokens for turn in self.turns)

    def context_ids(self) -> list[int]:
        """Return the token ids that the next turn continues: the prompt, and all that followed."""
        return [*self.prompt_ids, *self.token_ids]

    def to_json(self) -> dict[str, Any]:
        """Return the episode as JSON; Python's floats survive it exactly."""
        content = asdict(self)
        # JSON has no NaN.
        content["score"] = None if math.isnan(self.score) else self.score
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Episode:
        """Return the episode of ``to_json``."""
        fields = dict(content)
        fields["turns"] = [PolicyTurn(**turn) for turn in fields["turns"]]
        fields["calls"] = [CallRecord(**call) for call in fields["calls"]]
        fields["score"] = math.nan if fields["score"] is None else fields["score"]
        return cls(**fields)


def failed_episode(prompt_ids: list[int], eos: int, failure: str) -> Episode:
    """Return an episode whose environment failed before its first turn.

    A rollout needs a token for every response. This episode has an end of turn of unknown log-probability, which is
    masked in training.
    """
    return Episode(
        prompt_ids=prompt_ids or [eos],
        turns=[PolicyTurn([eos], [math.nan], False, "")],
        stop="failed",
        failure=failure,
    )


# ---- the conversation ----


def opening(episode: Episode) -> list[Message]:
    """Return the messages before the policy's first turn; empty if the environment failed in ``reset``."""
    places = turn_places(episode)
    return episode.messages[: places[0]] if places else list(episode.messages)


def turn_places(episode: Episode) -> list[int]:
    """Return the indices of the policy's turns among the messages; an environment's examples come before them."""
    if never_began(episode):
        return []
    places = [index for index, message in enumerate(episode.messages) if message["role"] == "assistant"]
    return places[-len(episode.turns) :]


def scored_messages(episode: Episode) -> list[Message]:
    """Return the conversation as an environment scores it: the policy's thoughts are fields of their messages."""
    messages = list(episode.messages)
    for place, turn in zip(turn_places(episode), episode.turns, strict=False):
        if not turn.thought_end:
            continue
        thought = turn.marked_thought
        answer = messages[place]["content"].removeprefix(thought)
        messages[place] = messages[place] | {"content": answer, "reasoning_content": thought}
    return messages


def sampled_tokens(episode: Episode) -> int:
    """Count the tokens that the policy sampled."""
    return 0 if never_began(episode) else sum(turn.tokens for turn in episode.turns)


def never_began(episode: Episode) -> bool:
    """Return whether the environment failed before the first turn, so the turn is a placeholder token."""
    return not episode.turns or any(map(math.isnan, episode.turns[0].logprobs))


def describe_episode(episode: Episode) -> dict[str, Any]:
    """Return the last answer, the turns with the messages before each, the calls, and the end of the episode."""
    return {
        "text": episode.text,
        "tokens": sampled_tokens(episode),
        "finished": episode.finished,
        **(thought_facts(episode.turns[-1]) if episode.turns else {}),
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
        described = {"prompt": "\n".join(before), "text": turn.text, "finished": turn.finished}
        yield described | thought_facts(turn)
        start = place + 1


# ---- rows ----


def prompt_of(episode: Episode) -> list[Message]:
    """Return the beginning of the episode as the ``prompt`` of a row."""
    return [_row_message(message) for message in opening(episode)]


def answer_of(episode: Episode, marks_malformed: bool = False) -> list[Message]:
    """Return the messages after the beginning as the answer of a row, up to the last turn.

    A turn with a malformed call is its sampled text; ``marks_malformed`` excludes it from training (``train: False``).
    Calls and results have ids, because some chat templates need them. The ids of a server are random, so they are
    replaced by numbers to make equal episodes equal.
    """
    places = turn_places(episode)
    if not places:
        return []
    # The ids that a policy sampled are part of its text.
    keeps_ids = not _is_served(episode)
    return _answer(episode, places, places[-1] + 1, marks_malformed=marks_malformed, keeps_ids=keeps_ids)


def dialogue(episode: Episode) -> list[Message]:
    """Return the conversation so far as the messages of a row, for a model to continue."""
    places = turn_places(episode)
    return [*prompt_of(episode), *(_answer(episode, places, len(episode.messages)) if places else [])]


def _answer(
    episode: Episode, places: Sequence[int], end: int, *, marks_malformed: bool = False, keeps_ids: bool = True
) -> list[Message]:
    """Return the messages from the first of the turns at ``places`` up to ``end``.

    In an episode of a server, the answer to a malformed call is a user's message, because a result needs a call.
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
            # A malformed call has no structure to store, so the row has the sampled text.
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
    """Return whether a server played the episode: its turns have no tokens."""
    return not any(turn.token_ids for turn in episode.turns)


def _with_ids(calls: Sequence[dict[str, Any]], keeps_ids: bool) -> list[dict[str, Any]]:
    """Return calls with ids: the call's own id if it has one and it is kept, otherwise a number."""
    calls_with_ids = []
    for index, call in enumerate(calls):
        own_id = call.get("id") if keeps_ids else None
        calls_with_ids.append({**call, "id": own_id or call_id_at(index)})
    return calls_with_ids


def call_id(call: ToolCall, index: int) -> str:
    """Return a call's own id, or an id of nine letters and digits, which Mistral's templates need."""
    return call.id or call_id_at(index)


def call_id_at(index: int) -> str:
    """Return the id of a call without an id, by its number in its turn."""
    return f"call{index:05d}"


def _row_message(message: Message) -> Message:
    """Return a message with the fields that rows store, and its calls as JSON text in OpenAI's nesting."""
    fields = {name: message[name] for name in ROW_FIELDS if message.get(name)}
    fields["content"] = message.get("content") or ""
    if fields.get("tool_calls"):
        calls = fields["tool_calls"]
        if isinstance(calls, str):
            calls = json.loads(calls)
        fields["tool_calls"] = tool_calls([_with_text(call) for call in calls], "messages")
    return fields


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with its arguments as JSON text, because null fields of an object are read as missing."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if not isinstance(arguments, dict):
        return call
    return {"id": call.get("id"), "name": function["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
