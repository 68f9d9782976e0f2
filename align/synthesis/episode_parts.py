"""Episodes of a checkpoint in a stage's environment, part by part, so that a killed stage plays none of them twice.

A part that is complete is a file. One that was killed goes on from its journal: no turn is sampled again, and no tool
called again. Used by ``sample`` and ``synthesize``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.environments.episode import Episode, sampled_tokens
from align.environments.episode_run import PromptedTurns, with_system
from align.environments.journal import Journal
from align.environments.player import EpisodeTask, open_player
from align.inference.protocol import RolloutEngine
from align.inference.sessions import open_session
from align.pipeline.context import StageContext
from align.store.fingerprint import digest
from align.store.sealed import read_entry, write_entry
from align.synthesis.episode_counts import FOLDER


@dataclass(frozen=True)
class Policy:
    """The checkpoint that plays."""

    tokenizer: Any
    weights: str
    """Digest of the weights."""
    open_engine: Callable[[], RolloutEngine]
    """Returns the engine that samples; called where something is to be sampled."""
    max_prompt_tokens: int
    system: str | None = None
    """System message for episodes that begin without one; rows do not have it."""


class EpisodeParts:
    """Plays the episodes of a stage with a checkpoint."""

    def __init__(self, context: StageContext, policy: Policy, total: int) -> None:
        """Open the environment for ``total`` episodes. Raises ``UserError`` for one that does not fit the policy."""
        player = open_player(context, policy.tokenizer, policy.max_prompt_tokens)
        assert player is not None, "the stage has an environment"
        if policy.system is not None:
            turns = PromptedTurns(player.rules.turns, with_system(policy.system))
            player.rules = replace(player.rules, turns=turns)
        self.player, self.policy, self.context, self.total = player, policy, context, total
        self.engine_name = "none"
        self.done = self.tokens = self.new_tokens = 0
        self.seconds = 0.0

    @property
    def tools(self) -> list[dict[str, Any]]:
        """JSON schemas of the environment's tools."""
        return self.player.source.tools

    def play_part(self, name: str, tasks: Sequence[EpisodeTask]) -> list[Episode]:
        """Return the episodes of some tasks, read back or played now."""
        path = self.context.checkpoints / FOLDER / f"{name}.jsonl"
        key = self._key(tasks)
        lines = read_entry(path, key, self.context.warn)
        if lines is None:
            # The key covers all that episodes depend on. A journal under another key is not used.
            journal = Journal(path.with_suffix(".journal"), key)
            episodes = self._sample(tasks, journal)
            write_entry(path, key, [self.engine_name, *(episode.to_json() for episode in episodes)])
            # Only now, so that a kill at any time leaves the journal or the file.
            journal.drop()
        else:
            self.engine_name, *stored = lines
            episodes = [Episode.from_json(content) for content in stored]
        self.done += len(episodes)
        self.tokens += sum(map(sampled_tokens, episodes))
        self.context.progress(self.done, self.total, "episodes", self.tokens)
        return episodes

    def _key(self, tasks: Sequence[EpisodeTask]) -> str:
        """Return a digest of all that the episodes depend on."""
        config = self.context.config
        return digest(
            {
                "policy": self.policy.weights,
                "precision": self.context.precision,
                "environment": config.environment.identity(),
                "sampling": [config.temperature, config.top_p, self.policy.max_prompt_tokens, self.policy.system],
                "tasks": [[task.row, task.seed] for task in tasks],
            }
        )

    def _sample(self, tasks: Sequence[EpisodeTask], journal: Journal) -> list[Episode]:
        """Play episodes, or play on where the journal ends."""
        engine = self.policy.open_engine()
        self.engine_name = engine.name
        started = time.perf_counter()
        session = open_session(engine, self.context.config.temperature, self.context.config.top_p)
        try:
            episodes = self.player.play_in(session, tasks, journal, self._report)
        finally:
            session.close()
        self.seconds += time.perf_counter() - started
        self.new_tokens += sum(map(sampled_tokens, episodes))
        return episodes

    def _report(self, done: int, _: int) -> None:
        self.context.progress(self.done + done, self.total, "episodes", self.tokens)

    def speed(self) -> dict[str, float]:
        """Return the tokens sampled, and the tokens per second of this attempt."""
        return {"tokens": self.tokens, "tokens_per_second": self.new_tokens / self.seconds if self.seconds else 0.0}

    def user_usage(self) -> dict[str, Any]:
        """Return ``user``: requests, tokens and cost of the server that plays the user; nothing without one."""
        return self.player.user_usage()

    def close(self) -> None:
        """End the environment's workers."""
        self.player.close()
