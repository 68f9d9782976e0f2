"""Play episodes of an environment with a checkpoint without training, and replay stored episodes.

A replay uses the stored turns of the policy and of a simulated user instead of sampling. It parses their calls, runs
the tools and scores the episode again. So it shows the effect of a changed environment or reward on the same behavior.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.base import Precision
from align.config.environment import EnvironmentConfig
from align.config.runtime import Runtime
from align.environments.episode import Episode, PolicyTurn
from align.environments.player import EnvironmentPlayer, EpisodeTask, Progress
from align.environments.simulated_user import SimulatedUser, UserAnswer, UserRequest
from align.environments.sources import open_environment
from align.environments.user_models import UserResources, open_user
from align.errors import UserError
from align.inference.engine import open_engine
from align.inference.protocol import Response, RolloutEngine, Session, TurnRequest
from align.models.loading import load_tokenizer
from align.store.json_files import numbered_lines, write_text_atomically


@dataclass(frozen=True)
class Rehearsal:
    """An environment, a checkpoint, and the settings of sampling."""

    environment: EnvironmentConfig
    model_dir: Path
    runtime: Runtime
    precision: Precision
    max_prompt_tokens: int
    temperature: float
    seed: int
    where: str
    """Name of the stage, for messages."""
    user_dir: Path | None = None
    """Checkpoint that plays the user; None if there is none."""
    thinking_budget: int | None = None
    """Tokens after which a thought is closed by force."""

    def open_player(self, user: SimulatedUser | None) -> EnvironmentPlayer:
        """Open the environment. Raises ``UserError`` if it does not fit the checkpoint."""
        source = open_environment(self.environment, f"{self.where}.environment")
        return EnvironmentPlayer(
            self.environment, source, load_tokenizer(self.model_dir), self.max_prompt_tokens, self.where, user
        )

    def open_user(self, folder: Path, warn: Any) -> SimulatedUser | None:
        """Open the simulated user, if there is one; a server's answers are cached in ``folder``."""
        config = self.environment.user
        if config is None:
            return None
        resources = UserResources(self.runtime, self.precision, folder, None, warn, outage_fails_episodes=True)
        return open_user(config, self.user_dir, resources, f"{self.where}.environment.user")

    def open_engine(self, warn: Any) -> RolloutEngine:
        """Open an engine for the checkpoint."""
        return open_engine(
            self.model_dir,
            self.runtime,
            precision=self.precision,
            max_length=self.max_prompt_tokens + self.environment.max_tokens,
            seed=self.seed,
            warn=warn,
        )


@dataclass(frozen=True)
class StoredEpisode:
    """An episode in a file, with its row and seed."""

    row: dict[str, Any]
    seed: int
    episode: Episode

    @property
    def task(self) -> EpisodeTask:
        """The task of the episode."""
        return EpisodeTask(self.row, self.seed)


def play(
    rehearsal: Rehearsal, tasks: Sequence[EpisodeTask], warn: Any, on_progress: Progress | None = None
) -> list[StoredEpisode]:
    """Sample an episode for each task."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="align-rehearsal-"))
        player = rehearsal.open_player(rehearsal.open_user(Path(folder), warn))
        stack.callback(player.close)
        player.check_rows(task.row for task in tasks)
        engine = rehearsal.open_engine(warn)
        stack.callback(engine.close)
        episodes = player.play(
            engine,
            tasks,
            temperature=rehearsal.temperature,
            on_progress=on_progress,
            thinking_budget=rehearsal.thinking_budget,
        )
    return [StoredEpisode(task.row, task.seed, episode) for task, episode in zip(tasks, episodes, strict=True)]


@dataclass(frozen=True)
class Replayed:
    """A stored episode and its replay."""

    before: Episode
    after: Episode
    logprob_gap: float | None = None
    """Mean absolute difference between the checkpoint's and the stored log-probabilities in nats per token; None if
    it was not measured."""

    @property
    def difference(self) -> str:
        """The first difference: the tokens, the calls or the score; empty if there is none."""
        if self.before.token_ids != self.after.token_ids:
            return "what the environment answers"
        calls = [[(call.name, call.arguments, call.error) for call in part.calls] for part in (self.before, self.after)]
        if calls[0] != calls[1]:
            return "how calls are read"
        # Failed episodes have the score NaN, which differs from itself.
        if self.before.score != self.after.score and not (self.before.stop == self.after.stop == "failed"):
            return "the score"
        return ""


def replay(rehearsal: Rehearsal, stored: Sequence[StoredEpisode], engine: RolloutEngine | None) -> list[Replayed]:
    """Replay stored episodes, and measure their tokens with ``engine``, unless it is None."""
    answers = ReplayUser([entry.episode.user_answers for entry in stored])
    player = rehearsal.open_player(None if rehearsal.environment.user is None else answers)
    try:
        session = ReplaySession([entry.episode.turns for entry in stored])
        episodes = player.play_in(session, [entry.task for entry in stored])
    finally:
        player.close()
    gaps = [None] * len(stored) if engine is None else _measure(engine, [entry.episode for entry in stored])
    return [Replayed(entry.episode, episode, gap) for entry, episode, gap in zip(stored, episodes, gaps, strict=True)]


def _measure(engine: RolloutEngine, episodes: Sequence[Episode]) -> list[float | None]:
    """Return the mean gap of each episode's log-probabilities from the engine's at temperature 1."""
    scored = engine.score_tokens([episode.prompt_ids for episode in episodes], [e.token_ids for e in episodes], 1.0)
    gaps: list[float | None] = []
    for episode, logprobs in zip(episodes, scored, strict=True):
        triples = zip(logprobs, episode.logprobs, episode.mask, strict=True)
        sampled_pairs = [(new, old) for new, old, is_sampled in triples if is_sampled]
        differences = [abs(new - old) for new, old in sampled_pairs if not math.isnan(old)]  # NaN: a failed start
        gaps.append(sum(differences) / len(differences) if differences else None)
    return gaps


class ReplaySession(Session):
    """Returns stored turns instead of sampling."""

    is_lockstep = True

    def __init__(self, turns: Sequence[Sequence[PolicyTurn]]) -> None:
        self._turns = turns
        self._requests: deque[tuple[int, int]] = deque()
        """Episode and turn of each request."""
        self._asked = [0] * len(turns)

    @property
    def pending(self) -> int:
        """Number of requested turns."""
        return len(self._requests)

    def submit(self, request: TurnRequest) -> None:
        """Ask for the next turn of the episode ``request.key``."""
        self._requests.append((request.key, self._asked[request.key]))
        self._asked[request.key] += 1

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """Return all requested turns. A turn that was not stored is empty and cut off."""
        responses: list[tuple[int, Response]] = []
        while self._requests:
            episode, number = self._requests.popleft()
            turns = self._turns[episode]
            # A changed environment may ask for more turns than were stored.
            turn = turns[number] if number < len(turns) else PolicyTurn([], [], False, "")
            responses.append((episode, turn))
        return responses


class ReplayUser(SimulatedUser):
    """Returns the stored answers of a simulated user."""

    in_background = False

    def __init__(self, answers: Sequence[Sequence[str]]) -> None:
        self._answers = [deque(texts) for texts in answers]

    def answer(self, requests: Sequence[UserRequest]) -> list[UserAnswer]:
        """Return the next answer of each episode."""
        answers = []
        for request in requests:
            texts = self._answers[request.episode]
            missing = UserAnswer(failure="the stored episode has no further answer of the user.")
            answers.append(UserAnswer(texts.popleft()) if texts else missing)
        return answers


def write_episodes(path: Path, stored: Iterable[StoredEpisode]) -> None:
    """Write episodes to a file of JSON lines."""
    lines = [
        json.dumps({"row": entry.row, "seed": entry.seed, "episode": entry.episode.to_json()}, ensure_ascii=False)
        for entry in stored
    ]
    write_text_atomically(path, "".join(line + "\n" for line in lines))


def read_episodes(path: Path) -> list[StoredEpisode]:
    """Return the episodes in a file of ``write_episodes``. Raises ``UserError`` with the first invalid line."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; `align rollout … --save FILE` writes one.")
    stored = []
    for number, line in numbered_lines(path):
        try:
            entry = json.loads(line)
            stored.append(StoredEpisode(entry["row"], int(entry["seed"]), Episode.from_json(entry["episode"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}:{number}: no episode of `align rollout … --save` ({type(error).__name__}: {error})."
            ) from None
    if not stored:
        raise UserError(f"{path}: has no episodes.")
    return stored
