"""An episode: the turns that a policy sampled, what an environment wrote between them, calls and scores. Torch-free.

Token ids travel from the sampler to the loss; text is never tokenized again. ``token_ids``, ``logprobs`` and ``mask``
lay the episode out as one response: ``mask`` is True on the policy's own tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Message = dict[str, Any]

Stop = Literal["finished", "truncated", "max_turns", "failed"]
"""End of an episode: the model or its environment ended it; a turn or the episode reached its maximum of tokens; it
reached its maximum of turns; or its environment failed."""


@dataclass(frozen=True)
class PolicyTurn:
    """One turn that the policy sampled."""

    token_ids: list[int]
    """Sampled tokens, the end of turn included where there is one."""
    logprobs: list[float]
    """The engine's log-probability of each token."""
    finished: bool
    """True where the end of turn was sampled."""
    text: str
    """The tokens decoded, special ones left out."""
    weights_update: int | None = None
    """Update before which the policy had the weights that sampled it; None outside of training."""

    @property
    def tokens(self) -> int:
        """Number of tokens that were sampled."""
        return len(self.token_ids)


@dataclass(frozen=True)
class CallRecord:
    """One call of a tool in an episode, or one that could not be read."""

    turn: int
    name: str
    """Empty for a call that is malformed."""
    arguments: dict[str, Any]
    result: str
    """Text that answers the model."""
    error: Literal["", "malformed", "arguments", "raised", "timeout"] = ""
    """What went wrong: it cannot be read, its tool or arguments are none, or the tool raised or took too long."""
    seconds: float = 0.0


@dataclass
class Episode:
    """One episode. ``observations[i]`` are the token ids that follow turn i; the last turn has none."""

    prompt_ids: list[int]
    turns: list[PolicyTurn] = field(default_factory=list)
    observations: list[list[int]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    """The conversation, for people: nothing is tokenized from it."""
    calls: list[CallRecord] = field(default_factory=list)
    user_answers: list[str] = field(default_factory=list)
    """What a simulated user said, in order and whole: with the text that ends the conversation, and what was cut."""
    stop: Stop = "finished"
    score: float = math.nan
    """Total of the scores; NaN where the environment failed."""
    parts: dict[str, float] = field(default_factory=dict)
    """Scores by name."""
    turn_scores: list[float] | None = None
    """Score of each turn, which is part of ``score``; None where the environment scores whole episodes."""
    failure: str = ""
    """Reason why the environment failed."""

    @property
    def token_ids(self) -> list[int]:
        """Ids of all tokens after the prompt, (T,)."""
        return [token for segment, _ in self._segments() for token in segment]

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
        """Update whose weights sampled each of ``token_ids``, (T,): that of the turn before on the environment's."""
        updates: list[int | None] = []
        for turn, observation in self._pairs():
            updates += [turn.weights_update] * (len(turn.token_ids) + len(observation))
        return updates

    @property
    def mask(self) -> list[bool]:
        """True on the tokens that the policy sampled, (T,)."""
        return [sampled for segment, sampled in self._segments() for _ in segment]

    @property
    def length(self) -> int:
        """Tokens after the prompt."""
        return sum(len(segment) for segment, _ in self._segments())

    @property
    def finished(self) -> bool:
        """True where the last turn ended by itself and nothing cut the episode off."""
        return self.stop == "finished"

    @property
    def text(self) -> str:
        """Text of the last turn: the answer that scorers of single responses read."""
        return self.turns[-1].text if self.turns else ""

    def _pairs(self) -> list[tuple[PolicyTurn, list[int]]]:
        # The last turn has no observation, so it is paired with an empty one.
        observations = [*self.observations, *([[]] * (len(self.turns) - len(self.observations)))]
        return list(zip(self.turns, observations, strict=True))

    def _segments(self) -> list[tuple[list[int], bool]]:
        """Return the token ids of each turn and observation, in order, and whether the policy sampled them."""
        segments: list[tuple[list[int], bool]] = []
        for turn, observation in self._pairs():
            segments += [(turn.token_ids, True), (observation, False)]
        return segments

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

    A rollout needs a token for every response. This one is an end of turn of unknown log-probability, which nothing
    learns from.
    """
    return Episode(
        prompt_ids=prompt_ids or [eos],
        turns=[PolicyTurn([eos], [math.nan], False, "")],
        stop="failed",
        failure=failure,
    )
