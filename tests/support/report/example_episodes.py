"""Lines of the report page about episodes, as it reads them from stored rollouts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from align.environments.episode import Episode, PolicyTurn
from align.environments.episode_run import EpisodeRun
from tests.support.environments.letters import EOS, letter_rules


def play(prompt: list[dict[str, Any]], script: list[Any], max_turns: int = 4, has_step: bool = False) -> Episode:
    """Return the episode of a script: a text is a sampled turn, an exception a failure, all else a result."""
    most = 10**7
    rules = letter_rules(
        shorten=lambda result: result,
        has_step=has_step,
        max_turns=max_turns,
        max_tokens=most,
        turn_max_tokens=most,
        max_prompt_tokens=most,
    )
    run = EpisodeRun({"prompt": prompt}, 5, rules)
    run.take_result(None)
    for part in script:
        if isinstance(part, str):
            ids = [*map(ord, part), EOS]
            run.take_turn(PolicyTurn(ids, [-1.0] * len(ids), True, part))
        elif isinstance(part, Exception):
            run.fail(str(part))
        else:
            run.take_result(part)
    assert run.action is None
    return run.episode


def episode_line(episode: Episode, prompt: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return the line of an episode (``align.report.scorecard.stored_rollouts``)."""
    texts = [chr(token) if token != EOS else "" for token in episode.token_ids]
    return {
        "update": 1,
        "prompt": prompt,
        "response": episode.text,
        "score": episode.score,
        "kl": 0.5,
        "tokens": episode.length,
        "finished": episode.finished,
        "by_token": [[text, 0.1, 0.2, -0.3] for text in texts],
        "messages": episode.messages,
        "calls": [asdict(call) for call in episode.calls],
        "turns": len(episode.turns),
        "turn_scores": episode.turn_scores,
        "stop": episode.stop,
        "failure": episode.failure,
        "sampled": episode.mask,
    } | more
