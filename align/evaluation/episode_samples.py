"""Episodes as lines of ``samples.jsonl``: conversations with their calls, turns and scores. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from align.environments.conversation import describe_episode, opening
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
                    describe_episode(episode) | {"scores": _scores(result, name, index, number, episode)}
                    for number, episode in enumerate(per_item[index])
                ]
                for name, per_item in episodes.items()
            },
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
