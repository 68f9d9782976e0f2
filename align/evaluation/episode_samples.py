"""Episodes as lines of ``samples.jsonl``: conversations with their calls, turns and scores. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from align.data.rows import Message
from align.environments.episode import Episode
from align.evaluation.scorecard import TaskResult
from align.evaluation.tasks.base import Episodes
from align.evaluation.tasks.environment import SCORE


def episode_samples(result: TaskResult, episodes: Mapping[str, Episodes]) -> Iterator[dict[str, Any]]:
    """Yield a line for each row that systems played; ``prompt`` is how the environment began its episodes."""
    for index, item in enumerate(result.task.items):
        openings = [opening(episode) for per_item in episodes.values() for episode in per_item[index]]
        yield {
            "task": result.task.name,
            "id": item.id,
            "source": item.source,
            "prompt": next(filter(None, openings), item.prompt),
            "responses": {
                name: [
                    _describe(episode) | {"scores": _scores(result, name, index, number, episode)}
                    for number, episode in enumerate(per_item[index])
                ]
                for name, per_item in episodes.items()
            },
        }


def opening(episode: Episode) -> list[Message]:
    """Return the messages before the policy's first turn; empty for an environment that failed at once."""
    places = _turn_places(episode)
    return episode.messages[: places[0]] if places else list(episode.messages)


def sampled_tokens(episode: Episode) -> int:
    """Count the tokens that the policy sampled."""
    return 0 if never_began(episode) else sum(len(turn.token_ids) for turn in episode.turns)


def never_began(episode: Episode) -> bool:
    """Return True where the environment failed before the first turn, in whose place a token stands."""
    return not episode.turns or any(map(math.isnan, episode.turns[0].logprobs))


def _describe(episode: Episode) -> dict[str, Any]:
    """Return the last answer, the turns with what was said before each, the calls, and how the episode ended."""
    return {
        "text": episode.text,
        "tokens": sampled_tokens(episode),
        "finished": episode.finished,
        "turns": list(_described_turns(episode)),
        "messages": episode.messages,
        "calls": [asdict(call) for call in episode.calls],
        "parts": episode.parts,
        "turn_scores": episode.turn_scores,
        "stop": episode.stop,
        "failure": episode.failure,
    }


def _scores(result: TaskResult, name: str, index: int, number: int, episode: Episode) -> dict[str, float]:
    """Return an episode's numbers. A number of its row alone, such as pass@k, belongs to all of the row's episodes."""
    scores = {}
    for metric, values in result.measured[name].values.items():
        numbers = values[index]
        if metric == SCORE:
            # An episode that failed has none, so the others do not stand at their own numbers.
            numbers = [] if math.isnan(episode.score) else [episode.score]
        if numbers:
            scores[metric] = numbers[min(number, len(numbers) - 1)]
    return scores


def _described_turns(episode: Episode) -> Iterator[dict[str, Any]]:
    start = 0
    for turn, place in zip(episode.turns, _turn_places(episode), strict=False):
        before = [str(message["content"]) for message in episode.messages[start:place]]
        yield {"prompt": "\n".join(before), "text": turn.text, "finished": turn.finished}
        start = place + 1


def _turn_places(episode: Episode) -> list[int]:
    """Return the indices of the policy's turns among the messages; an environment's examples come before them."""
    if never_began(episode):
        return []
    places = [index for index, message in enumerate(episode.messages) if message["role"] == "assistant"]
    return places[-len(episode.turns) :]
