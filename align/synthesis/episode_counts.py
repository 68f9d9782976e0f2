"""Counts over a stage's episodes: failures, turns, calls, and how they ended. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from align.environments.episode import Episode
from align.errors import UserError
from align.pipeline.context import StageContext

FOLDER = "episodes"
"""Folder of a stage's episodes and their journals among its checkpoints."""


def report_failures(context: StageContext, episodes: Sequence[Episode]) -> None:
    """Warn of episodes that failed, with the first reason. Raises ``UserError`` where all of them did."""
    failures = [episode.failure for episode in episodes if episode.stop == "failed"]
    if failures and len(failures) == len(episodes):
        raise UserError(f"{context.name}.environment: all {len(episodes)} episodes failed; the first in {failures[0]}")
    if failures:
        context.warn(f"{len(failures)} of {len(episodes)} episodes failed and are left out; the first in {failures[0]}")


def episode_rates(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return means over episodes, under the names that stages of RL log: turns, calls, errors, ends."""
    count = len(episodes)
    if not count:
        return {}
    calls = [call for episode in episodes for call in episode.calls]
    sums = {
        "turns": sum(len(episode.turns) for episode in episodes),
        "calls": len(calls),
        "malformed_calls": sum(call.error == "malformed" for call in calls),
        "tool_errors": sum(call.error in ("arguments", "raised", "timeout") for call in calls),
        "tool_seconds": sum(call.seconds for call in calls),
        "truncated_rate": sum(episode.stop == "truncated" for episode in episodes),
        "max_turns_rate": sum(episode.stop == "max_turns" for episode in episodes),
        "failure_rate": sum(episode.stop == "failed" for episode in episodes),
    }
    return {name: value / count for name, value in sums.items()}
