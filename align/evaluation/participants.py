"""Compared systems in the phases of an evaluation: they answer, play episodes and read.

Episodes are played in parts. A complete part is cached, for this evaluation and for others of the same weights. A part
that was killed continues from its journal: no turn is sampled twice, and no tool is called twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.config.runtime import Runtime
from align.config.runtime.rollouts import EPISODES_TOGETHER
from align.data.rows import Message
from align.environments.episode import Episode, never_began, sampled_tokens
from align.environments.episode_run import PromptedTurns
from align.environments.journal import Journal
from align.environments.player import EnvironmentPlayer, EpisodeTask, episode_seed, row_tasks
from align.environments.simulated_user import SimulatedUser
from align.environments.user_models import UserResources, open_user
from align.evaluation.answers import Episodes, EpisodeSet, Example
from align.evaluation.logprobs import LoadedModels
from align.evaluation.scorecard import SystemInfo
from align.evaluation.scoring import ResultCache
from align.evaluation.systems import Sampler, System
from align.inference.protocol import Response, Sampling
from align.inference.sessions import open_session
from align.inference.thoughts import ThinkingSession, ThoughtReader
from align.store.fingerprint import digest

NO_ANSWER = Response([], [], False, "")
"""The answer to a conversation that is longer than the engine can hold."""


class Respondent:
    """One system while the evaluation's engine holds its weights."""

    def __init__(self, system: System, sampler: Sampler, max_length: int, warn: Callable[[str], None]) -> None:
        """``max_length`` is the length of prompt and response together, in tokens, that the engine can hold."""
        self.system = system
        self.sampler = sampler
        self.max_length = max_length
        self.warn = warn
        self.info = system.info

    def answer(
        self,
        prompts: Sequence[list[Message]],
        sampling: Sampling,
        examples: Sequence[Example] = (),
        *,
        is_continuation: bool = False,
    ) -> list[list[Response]]:
        """Return ``sampling.n`` responses to each conversation (times N for a best-of-N system), cached on disk.

        The system adds its own system message and examples. A conversation that leaves no room for the answer gets an
        empty, unfinished one.

        Args:
            prompts: The conversations.
            sampling: Length, temperature and number of the responses.
            examples: The task's, of which a few-shot system shows the first; too few raise ``UserError``.
            is_continuation: True for later turns of conversations that a best-of-N system already has N times, so they
                are not multiplied by N again.
        """
        system_sampling = self.system.sampling(sampling)
        if is_continuation:
            # Later turns continue one sample each, so best of N does not multiply them again.
            system_sampling = replace(system_sampling, n=sampling.n)
        rendered = [self.system.render(prompt, examples) for prompt in prompts]
        fitting = [index for index, ids in enumerate(rendered) if len(ids) + sampling.max_tokens <= self.max_length]
        if len(fitting) < len(rendered):
            self.warn(
                f"{self.info.name}: {len(rendered) - len(fitting)} conversations and max_tokens {sampling.max_tokens} "
                f"are longer than {self.max_length} tokens; they count as not answered. Raise max_context"
            )
        ids = [rendered[index] for index in fitting]
        responses = self.sampler.generate(self.system.policy, ids, system_sampling).responses
        # Every conversation gets an answer, so systems stay aligned item by item.
        answers = [[NO_ANSWER] * system_sampling.n for _ in prompts]
        for index, samples in zip(fitting, responses, strict=True):
            answers[index] = samples
        return answers


class Reader:
    """One system's own forward pass. Systems of role ``best_of`` never read: they have no distribution."""

    def __init__(self, system: System, models: LoadedModels, results: ResultCache, runtime: Runtime) -> None:
        self.system = system
        self.results = results
        self.runtime = runtime
        self.info = system.info
        self.tokenizer = system.policy.tokenizer
        self.model_dir: Path = system.policy.model_dir
        self._logprobs = models.logprobs_of(system.policy.name, 1.0)
        self._precision = models.precision
        self.max_length = max_input_tokens(self.model_dir, self.tokenizer)

    def render(self, prompt: list[Message], examples: Sequence[Example] = ()) -> list[int]:
        """Return the ids of a conversation up to the answer's start, the system's own prompt included."""
        return self.system.render(prompt, examples)

    def logprobs(self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token of a continuation, in nats, at temperature 1; no context may be empty."""
        return self._logprobs([list(ids) for ids in contexts], [list(ids) for ids in continuations])

    def cached(self, name: str, identity: Any, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``'s JSON-able result, or an earlier run's for this system under the same ``identity``."""
        # The number is raised when the forward pass changes.
        key = digest(["read 2", self.info.key, self._precision, identity])
        return self.results.read_or_compute(f"{name}-{self.info.name}", key, compute)


def max_input_tokens(model_dir: Path, tokenizer: Any) -> int:
    """Return the number of tokens that a model can read at once; 2048 if neither file limits it."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    limits = [value for value in (positions, tokenizer.model_max_length) if isinstance(value, int) and value > 0]
    return min(limits) if limits else 2048


@dataclass(frozen=True)
class Performer:
    """One system that acts in environments through the evaluation's engine. Best-of-N systems play no episodes."""

    system: System
    sampler: Sampler
    results: ResultCache
    journals: Path
    """Folder of the episodes that are being played."""
    max_length: int
    """Tokens of an episode and its prompt together that the engine can hold."""
    users: UserResources
    """Runtime and folders of the models that play users."""
    warn: Callable[[str], None]
    note: Callable[[str], None]

    @property
    def info(self) -> SystemInfo:
        """The system that plays."""
        return self.system.info

    def play(self, episode_set: EpisodeSet) -> Episodes:
        """Return the episodes of a task, kept on disk.

        The system adds its own system message and examples before the first message of each. An episode whose prompt
        leaves no room for ``max_tokens`` counts as failed.
        """
        # A system that is sampled again gets its own seeds.
        sampling = self.system.sampling(Sampling(1, episode_set.temperature, seed=episode_set.seed))
        tasks = episode_tasks(episode_set, sampling.seed)
        episodes: list[Episode] = []
        for start in range(0, len(tasks), EPISODES_TOGETHER):
            episodes += self._part(episode_set, tasks[start : start + EPISODES_TOGETHER])
        self._report_long_prompts(episode_set, episodes)
        return [episodes[start : start + episode_set.samples] for start in range(0, len(episodes), episode_set.samples)]

    def _part(self, episode_set: EpisodeSet, tasks: Sequence[EpisodeTask]) -> list[Episode]:
        """Return the episodes of some tasks, from the cache or played now."""
        budget = self.sampler.thinking_budget
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
                **({} if budget is None else {"thinking_budget": budget}),
            }
        )
        stored = self.results.read("episodes", identity)
        if stored is None:
            journal = Journal(self.journals / f"{identity[:32]}.jsonl", identity)
            content = self._sample(episode_set, tasks, journal)
            stored = self.results.write("episodes", identity, content)
            # Drop the journal only now, so a kill at any time leaves the journal or the result.
            journal.drop()
        episodes = [Episode.from_json(content) for content in stored["episodes"]]
        self.sampler.count(len(episodes), sum(map(sampled_tokens, episodes)), stored["engine"])
        return episodes

    def _sample(self, episode_set: EpisodeSet, tasks: Sequence[EpisodeTask], journal: Journal) -> dict[str, Any]:
        """Play episodes, or continue from the end of the journal. JSON-able."""
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
            session = ThinkingSession(
                open_session(engine, episode_set.temperature),
                ThoughtReader(policy.tokenizer),
                self.sampler.thinking_budget,
            )
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
