"""Episodes of every compared system in a task's environment, by the evaluation's one engine, kept on disk.

Episodes are played in parts. A part that is complete is cached, for this evaluation and for others of the same weights.
One that was killed goes on from its journal: no turn is sampled twice, and no tool is called twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.config.batch_sizes import EPISODES_TOGETHER
from align.environments.conversation import never_began, sampled_tokens
from align.environments.environment_player import EnvironmentPlayer
from align.environments.episode import Episode
from align.environments.journal import Journal
from align.environments.player import EpisodeTask, episode_seed, row_tasks
from align.environments.prompted_turns import PromptedTurns
from align.environments.simulated_user import SimulatedUser
from align.environments.user_models import UserResources, open_user
from align.evaluation.generation import Sampler
from align.evaluation.measure import ResultCache
from align.evaluation.systems import System
from align.evaluation.tasks.base import Episodes, EpisodeSet, SystemInfo
from align.inference.protocol import Response, Sampling, Session, TurnRequest
from align.inference.sessions import open_session
from align.store.fingerprint import digest


@dataclass(frozen=True)
class SystemPerformer:
    """One system, playing through the evaluation's engine."""

    system: System
    sampler: Sampler
    results: ResultCache
    journals: Path
    """Folder of the episodes that are being played."""
    max_length: int
    """Tokens of an episode and its prompt together that the engine can hold."""
    users: UserResources
    """What models that play users get."""
    warn: Callable[[str], None]
    note: Callable[[str], None]

    @property
    def info(self) -> SystemInfo:
        """The system that plays."""
        return self.system.info

    def play(self, episode_set: EpisodeSet) -> Episodes:
        """See the protocol. An episode whose prompt leaves no room for ``max_tokens`` counts as failed."""
        # A system that is sampled again gets seeds of its own.
        sampling = self.system.sampling(Sampling(1, episode_set.temperature, seed=episode_set.seed))
        tasks = episode_tasks(episode_set, sampling.seed)
        episodes: list[Episode] = []
        for start in range(0, len(tasks), EPISODES_TOGETHER):
            episodes += self._part(episode_set, tasks[start : start + EPISODES_TOGETHER])
        self._report_long_prompts(episode_set, episodes)
        return [episodes[start : start + episode_set.samples] for start in range(0, len(episodes), episode_set.samples)]

    def _part(self, episode_set: EpisodeSet, tasks: Sequence[EpisodeTask]) -> list[Episode]:
        """Return the episodes of some tasks, from the cache or played now."""
        identity = digest(
            {
                # The number is raised when the same episodes would be played in another way.
                "episodes": 1,
                "key": self.info.key,
                "environment": episode_set.identity,
                "tasks": [[task.row, task.seed] for task in tasks],
                "temperature": episode_set.temperature,
                "max_length": self.max_length,
                "engine": self.sampler.identity,
            }
        )
        stored = self.results.read("episodes", identity)
        if stored is None:
            journal = Journal(self.journals / f"{identity[:32]}.jsonl", identity)
            content = self._sample(episode_set, tasks, journal)
            stored = self.results.write("episodes", identity, content)
            # Only now, so that a kill at any time leaves the journal or the result.
            journal.drop()
        episodes = [Episode.from_json(content) for content in stored["episodes"]]
        self.sampler.count(len(episodes), sum(map(sampled_tokens, episodes)), stored["engine"])
        return episodes

    def _sample(self, episode_set: EpisodeSet, tasks: Sequence[EpisodeTask], journal: Journal) -> dict[str, Any]:
        """Play episodes, or play on where the journal ends. JSON-able."""
        policy = self.system.policy
        engine = self.sampler.engine_with(policy)
        place = f"tasks.{episode_set.task}: {policy.name}"
        player = EnvironmentPlayer(
            episode_set.environment,
            episode_set.source,
            policy.tokenizer,
            self._max_prompt_tokens(episode_set),
            place,
            self._open_user(episode_set),
        )
        if player.training_template:
            self.note(
                f"{place}: the chat template rewrites earlier turns, so episodes are rendered by align's training "
                f"template {player.training_template}"
            )
        if not self.system.is_plain:
            player.rules = replace(player.rules, turns=PromptedTurns(player.rules.turns, self.system.conversation))
        try:
            session = DecodingSession(open_session(engine, episode_set.temperature), policy.tokenizer)
            try:
                episodes = player.play_in(session, tasks, journal, self.sampler.report)
            finally:
                # Before the weights change.
                session.close()
            self._report_usage(episode_set.task, player.user_usage().get("user"))
        finally:
            player.close()
        return {"engine": engine.name, "episodes": [episode.to_json() for episode in episodes]}

    def _open_user(self, episode_set: EpisodeSet) -> SimulatedUser | None:
        """Open the model that plays the user of a task's episodes. It is freed with the part's last episode."""
        config = episode_set.environment.user
        if config is None:
            return None
        return open_user(config, episode_set.user_dir, self.users, f"tasks.{episode_set.task}.environment.user")

    def _report_usage(self, task: str, usage: dict[str, Any] | None) -> None:
        """Note what the server that plays the user was asked so far, by all attempts of the stage."""
        if usage is None:
            return
        cost = f", for {usage['cost']:g}" if "cost" in usage else ""
        self.note(
            f"tasks.{task}: the user's server has answered {usage['requests']} requests, with {usage['prompt_tokens']} "
            f"tokens of prompts and {usage['completion_tokens']} of answers{cost}"
        )

    def _max_prompt_tokens(self, episode_set: EpisodeSet) -> int:
        return self.max_length - episode_set.environment.max_tokens

    def _report_long_prompts(self, episode_set: EpisodeSet, episodes: Sequence[Episode]) -> None:
        """Warn of episodes that never began. Their prompts were cut, and are as long as a prompt may be."""
        limit = self._max_prompt_tokens(episode_set)
        count = sum(
            episode.stop == "failed" and len(episode.prompt_ids) == limit and never_began(episode)
            for episode in episodes
        )
        if count:
            self.warn(
                f"{self.info.name}: {count} prompts of {episode_set.task} leave no room for its environment.max_tokens "
                f"{episode_set.environment.max_tokens} in {self.max_length} tokens; their episodes count as failed. "
                "Raise max_context"
            )


def episode_tasks(episode_set: EpisodeSet, seed: int) -> list[EpisodeTask]:
    """Return the tasks of all episodes of a set, row by row, with seeds that follow from ``seed``."""
    tasks: list[EpisodeTask] = []
    for row, id in zip(episode_set.rows, episode_set.ids, strict=True):
        tasks += row_tasks(row, [episode_seed(seed, id, sample) for sample in range(episode_set.samples)])
    return tasks


class DecodingSession:
    """A session whose texts are decoded with a tokenizer of its own; a ``Session``.

    The engine was opened with another checkpoint's tokenizer.
    """

    def __init__(self, session: Session, tokenizer: Any) -> None:
        self._session, self._tokenizer = session, tokenizer
        self.is_lockstep = session.is_lockstep

    @property
    def pending(self) -> int:
        """See the protocol."""
        return self._session.pending

    def submit(self, request: TurnRequest) -> None:
        """See the protocol."""
        self._session.submit(request)

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """See the protocol."""
        return [(key, self._decode(response)) for key, response in self._session.poll(timeout)]

    def cache_statistics(self) -> dict[str, float] | None:
        """See the protocol."""
        return self._session.cache_statistics()

    def close(self) -> None:
        """See the protocol."""
        self._session.close()

    def _decode(self, response: Response) -> Response:
        text = str(self._tokenizer.decode(response.token_ids, skip_special_tokens=True))
        return replace(response, text=text)
