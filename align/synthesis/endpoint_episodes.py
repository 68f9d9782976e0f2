"""Episodes that a server plays in a stage's environment, through its chat API with tools. Torch-free.

Its answers are requests like any others: cached by content, within the budget, and retried. What the environment did is
in a journal, so that a killed stage makes no finished call again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from align.data.rows import Message
from align.environments.chat_episodes import Ask, ChatPlayer, ChatSession, chat_rules
from align.environments.episode import Episode
from align.environments.episode_run import with_system
from align.environments.journal import Journal
from align.environments.player import EpisodeTask
from align.environments.simulated_user import UserTurns
from align.environments.sources import open_environment
from align.environments.user_models import open_stage_user, user_prompt, user_usage
from align.environments.worker_pool import EnvironmentPool
from align.inference.requests import Request
from align.pipeline.context import StageContext
from align.store.fingerprint import digest
from align.synthesis.episode_counts import FOLDER


class EndpointEpisodes:
    """Plays the episodes of a stage with its ``endpoint``."""

    def __init__(self, context: StageContext, identity: dict[str, str], ask: Ask) -> None:
        """Open the environment. ``identity`` is the model's in requests, which ``ask`` answers."""
        self.context, self.identity, self._ask = context, identity, ask
        config = context.config.environment
        source = open_environment(config, f"{context.name}.environment")
        self.tools: list[dict[str, Any]] = source.tools
        self._rules = chat_rules(config, source.has_step)
        self._pool = EnvironmentPool(source, config.workers, config.tool_seconds, config.isolation)
        self._user = open_stage_user(context)
        self._with_system = with_system(context.config.system)

    def play_part(self, name: str, tasks: Sequence[EpisodeTask]) -> list[Episode]:
        """Return the episodes of some tasks, played on where the journal ends."""
        # The journal stays until the stage ends: answers are asked for again by every attempt, which counts their cost.
        journal = Journal(self.context.checkpoints / FOLDER / f"{name}.journal", self._key(tasks))
        try:
            read_prompt = partial(user_prompt, self.context.config.environment, self.context.name)
            turns = None if self._user is None else UserTurns(self._user, read_prompt, journal)
            if self._user is not None:
                self._user.load()
            session = ChatSession(self._request, self._ask, journal)
            return ChatPlayer(self._pool, self._rules, session, journal, user=turns).play(tasks)
        finally:
            journal.close()

    def user_usage(self) -> dict[str, Any]:
        """Return ``user``: requests, tokens and cost of the server that plays the user; nothing without one."""
        return user_usage(self._user)

    def _key(self, tasks: Sequence[EpisodeTask]) -> str:
        """Return a digest of all that the episodes depend on."""
        config = self.context.config
        return digest(
            {
                "model": self.identity,
                "environment": config.environment.identity(),
                "sampling": [config.temperature, config.top_p, config.system],
                "tasks": [[task.row, task.seed] for task in tasks],
            }
        )

    def _request(self, messages: list[Message], max_tokens: int, seed: int) -> Request:
        """Return the request for a turn. Episodes have numbers of their own, so that equal prompts have own answers."""
        config = self.context.config
        return Request(
            model=self.identity,
            messages=self._with_system(messages),
            max_tokens=max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=self.context.seed,
            sample=seed,
            tools=json.dumps(self.tools, ensure_ascii=False) if self.tools else "",
        )

    def close(self) -> None:
        """End the environment's workers, and free the user's model."""
        self._pool.close()
        if self._user is not None:
            self._user.close()
