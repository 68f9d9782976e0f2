"""Opens the environment of a stage, and plays episodes in it with an engine."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align.config.environment import EnvironmentConfig
from align.data.tool_calls import tool_call_format
from align.environments.environment import EnvironmentSource
from align.environments.episode import Episode
from align.environments.episode_run import EpisodeRules, UserRules
from align.environments.journal import Journal
from align.environments.player import EpisodePlayer, EpisodeTask, Progress
from align.environments.results import cut_text, split_notice, with_notice
from align.environments.simulated_user import SimulatedUser
from align.environments.sources import open_environment
from align.environments.turn_template import TurnTemplate
from align.environments.user_models import check_user_rows, open_stage_user, user_prompt, user_usage
from align.environments.user_turns import UserTurns
from align.environments.worker_pool import EnvironmentPool
from align.inference.protocol import Session
from align.inference.sessions import open_session
from align.pipeline.context import StageContext

CHARACTERS_PER_TOKEN = 16
"""Characters of a result that are looked at for each token of its limit: a megabyte is never tokenized."""


class EnvironmentPlayer:
    """Plays episodes in an environment; an ``EpisodeSource``."""

    def __init__(
        self,
        config: EnvironmentConfig,
        source: EnvironmentSource,
        tokenizer: Any,
        max_prompt_tokens: int,
        where: str,
        user: SimulatedUser | None = None,
    ) -> None:
        """``user`` is the model of the config's ``user``, where it has one; ``close`` closes it.

        Raises ``UserError`` for a chat template that has no place for the tools, or rewrites earlier turns.
        """
        if (config.user is None) != (user is None):
            raise ValueError("a simulated user needs its settings, and they need a user")
        self.config, self.source, self.tokenizer, self.user, self.where = config, source, tokenizer, user, where
        turns = TurnTemplate(tokenizer, source.tools or None, where)
        self.rules = EpisodeRules(
            turns=turns,
            call_format=tool_call_format(config.tool_format, turns.template) if source.tools else None,
            decode=self._decode,
            shorten=self._shorten,
            has_step=source.has_step,
            max_turns=config.max_turns,
            max_tokens=config.max_tokens,
            turn_max_tokens=config.turn_max_tokens or config.max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            user=None if config.user is None else UserRules(config.user.stop, config.user.opens),
        )
        self.training_template = turns.training
        """Name of the template that replaces the model's own, which rewrites earlier turns; empty for none."""
        self.pool = EnvironmentPool(source, config.workers, config.tool_seconds, config.isolation)
        self.cache_statistics: dict[str, float] | None = None
        """Use of the engine's prefix cache in the last call of ``play``."""

    def play(
        self,
        engine: Any,
        tasks: Sequence[EpisodeTask],
        *,
        temperature: float,
        journal: Journal | None = None,
        on_progress: Progress | None = None,
        weights_update: int | None = None,
    ) -> list[Episode]:
        """Return an episode for each task, in order; see ``EpisodeSource``."""
        session = open_session(engine, temperature)
        try:
            return self.play_in(session, tasks, journal, on_progress, weights_update)
        finally:
            self.cache_statistics = session.cache_statistics()
            session.close()

    def play_in(
        self,
        session: Session,
        tasks: Sequence[EpisodeTask],
        journal: Journal | None = None,
        on_progress: Progress | None = None,
        weights_update: int | None = None,
    ) -> list[Episode]:
        """Return an episode for each task, in order, with the turns of ``session``."""
        with contextlib.ExitStack() as stack:
            if journal is None:
                # Nothing goes on from it; instances that were lost are restored from it all the same.
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="align-episodes-"))
                journal = Journal(Path(folder) / "episodes.jsonl")
            stack.callback(journal.close)
            read_prompt = partial(user_prompt, self.config, self.where)
            turns = None if self.user is None else UserTurns(self.user, read_prompt, journal)
            # Before the policy's first turn, so that a model without room is an error at once.
            self.load_user()
            player = EpisodePlayer(self.pool, self.rules, session, journal, on_progress, weights_update, turns)
            return player.play(tasks)

    def load_user(self) -> None:
        """Load the weights of a checkpoint that plays the user, unless that was done."""
        if self.user is not None:
            self.user.load()

    def check_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raise ``UserError`` for a row without a column that the user's prompt quotes."""
        check_user_rows(self.config, rows, self.where)

    def close(self) -> None:
        """End the workers, and free the user's model."""
        self.pool.close()
        if self.user is not None:
            self.user.close()

    def user_usage(self) -> dict[str, Any]:
        """Return ``user``: requests, tokens and cost of the server that plays the user; nothing without one."""
        return user_usage(self.user)

    def _decode(self, token_ids: list[int]) -> str:
        # Some formats mark calls by special tokens.
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _shorten(self, result: str) -> str:
        """Return a result cut at ``max_result_tokens``, with a note of how much is missing."""
        limit = self.config.max_result_tokens
        # A result that the environment has cut keeps its notice, so the model reads the length of the whole result.
        result = cut_text(result, CHARACTERS_PER_TOKEN * limit)
        shown, length = split_notice(result)
        ids = self.tokenizer(shown, add_special_tokens=False)["input_ids"]
        if len(ids) <= limit:
            return result
        return with_notice(str(self.tokenizer.decode(ids[:limit], clean_up_tokenization_spaces=False)), length)


def open_player(
    context: StageContext,
    tokenizer: Any,
    max_prompt_tokens: int | None = None,
    *,
    outage_fails_episodes: bool = False,
) -> EnvironmentPlayer | None:
    """Return the player of a stage's ``environment``; None where it has none.

    ``max_prompt_tokens`` are the config's, where they are not given. For ``outage_fails_episodes`` see
    ``UserResources``.
    """
    config = context.config.environment
    if config is None:
        return None
    place = f"{context.name}.environment"
    source = open_environment(config, place)
    user = open_stage_user(context, outage_fails_episodes=outage_fails_episodes)
    limit = context.config.max_prompt_tokens if max_prompt_tokens is None else max_prompt_tokens
    player = EnvironmentPlayer(config, source, tokenizer, limit, context.name, user)
    if player.training_template:
        context.note(
            f"{context.name}: the model's chat template rewrites earlier turns, so episodes are rendered by align's "
            f"training template {player.training_template}"
        )
    return player
