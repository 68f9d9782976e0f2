"""Episodes of synthesis: their parts on disk, their counts, and those played at an endpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from align.data.rows import Message
from align.environments.chat_episodes import Ask, ChatPlayer, ChatSession, chat_rules
from align.environments.episode import Episode, sampled_tokens
from align.environments.episode_run import PromptedTurns, with_system
from align.environments.journal import Journal
from align.environments.player import EpisodeTask, open_player
from align.environments.simulated_user import UserTurns
from align.environments.sources import open_environment
from align.environments.user_models import open_stage_user, user_prompt, user_usage
from align.environments.worker_pool import EnvironmentPool
from align.errors import UserError
from align.inference.protocol import RolloutEngine
from align.inference.requests import Request
from align.inference.sessions import open_session
from align.inference.thoughts import ThinkingSession, ThoughtReader, thought_rates
from align.pipeline.context import StageContext
from align.store.fingerprint import digest
from align.store.json_files import read_entry, write_entry

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
    turns = [turn for episode in episodes for turn in episode.turns]
    return {name: value / count for name, value in sums.items()} | thought_rates(turns)


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
        """Open the environment for ``total`` episodes. Raises ``UserError`` if it does not fit the policy."""
        player = open_player(context, policy.tokenizer, policy.max_prompt_tokens)
        assert player is not None, "the stage has an environment"
        if policy.system is not None:
            turns = PromptedTurns(player.rules.turns, with_system(policy.system))
            player.rules = replace(player.rules, turns=turns)
        self.player = player
        self.policy = policy
        self.context = context
        self.total = total
        self.engine_name = "none"
        self.done = self.tokens = self.new_tokens = 0
        self.seconds = 0.0

    @property
    def _thinking_budget(self) -> int | None:
        """The stage's budget, if its kind has one."""
        return getattr(self.context.config, "thinking_budget", None)

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
            # Only now, so a kill at any time leaves the journal or the file.
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
        budget = self._thinking_budget
        return digest(
            {
                "policy": self.policy.weights,
                "precision": self.context.precision,
                "environment": config.environment.identity(),
                "sampling": [config.temperature, config.top_p, self.policy.max_prompt_tokens, self.policy.system],
                "tasks": [[task.row, task.seed] for task in tasks],
                **({} if budget is None else {"thinking_budget": budget}),
            }
        )

    def _sample(self, tasks: Sequence[EpisodeTask], journal: Journal) -> list[Episode]:
        """Play episodes, or continue at the end of the journal."""
        engine = self.policy.open_engine()
        self.engine_name = engine.name
        started = time.perf_counter()
        session = ThinkingSession(
            open_session(engine, self.context.config.temperature, self.context.config.top_p),
            ThoughtReader(self.policy.tokenizer),
            self._thinking_budget,
        )
        try:
            episodes = self.player.play_in(session, tasks, journal, self._report)
        finally:
            session.close()
        self.seconds += time.perf_counter() - started
        self.new_tokens += sum(map(sampled_tokens, episodes))
        return episodes

    def _report(self, completed: int, _: int) -> None:
        self.context.progress(self.done + completed, self.total, "episodes", self.tokens)

    def speed(self) -> dict[str, float]:
        """Return the tokens sampled, and the tokens per second of this attempt."""
        return {"tokens": self.tokens, "tokens_per_second": self.new_tokens / self.seconds if self.seconds else 0.0}

    def user_usage(self) -> dict[str, Any]:
        """Return ``user``: requests, tokens and cost of the server that plays the user; empty without one."""
        return self.player.user_usage()

    def close(self) -> None:
        """End the environment's workers."""
        self.player.close()


class EndpointEpisodes:
    """Plays the episodes of a stage with its ``endpoint``."""

    def __init__(self, context: StageContext, identity: dict[str, str], ask: Ask) -> None:
        """Open the environment. ``identity`` is the model's in requests, which ``ask`` answers."""
        self.context = context
        self.identity = identity
        self._ask = ask
        config = context.config.environment
        source = open_environment(config, f"{context.name}.environment")
        self.tools: list[dict[str, Any]] = source.tools
        self._rules = chat_rules(config, source.has_step)
        self._pool = EnvironmentPool(source, config.workers, config.tool_seconds, config.isolation)
        self._user = open_stage_user(context)
        self._with_system = with_system(context.config.system)

    def play_part(self, name: str, tasks: Sequence[EpisodeTask]) -> list[Episode]:
        """Return the episodes of some tasks, continued at the end of the journal."""
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
        """Return ``user``: requests, tokens and cost of the server that plays the user; empty without one."""
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
        """Return the request for a turn. Episodes have separate numbers, so equal prompts have separate answers."""
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
