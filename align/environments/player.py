"""Plays episodes: many at the same time, each at its own pace. Torch-free.

The loop of ``EpisodePlayer`` has three sources of work. The session samples all turns that are ready with one call of
the engine, the environments run their methods, and a simulated user answers, if there is one. A result is in the
journal before it is used, so a killed rollout samples no turn and makes no call twice. ``EnvironmentPlayer`` holds the
environment of a stage and plays rollouts in it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from align.config.environment import EnvironmentConfig
from align.config.runtime.rollouts import EPISODES_TOGETHER
from align.data.tool_calls import tool_call_format
from align.environments.environment import EnvironmentSource
from align.environments.episode import Episode, PolicyTurn
from align.environments.episode_run import Act, EpisodeRules, EpisodeRun, SampleTurn, limits
from align.environments.journal import Journal, JournaledEnvironment, Position
from align.environments.results import EnvironmentFailed, cut_text, split_notice, with_notice
from align.environments.simulated_user import SimulatedUser, UserTurns
from align.environments.sources import open_environment
from align.environments.turn_template import TurnTemplate
from align.environments.user_models import check_user_rows, open_stage_user, user_prompt, user_usage
from align.environments.worker_pool import EnvironmentPool
from align.inference.protocol import Response, Session, TurnRequest
from align.inference.thoughts import ThinkingSession, ThoughtReader
from align.pipeline.context import StageContext
from align.store.fingerprint import digest

TURN_SECONDS = 0.05
"""Seconds of decoding between two checks for results of tools."""
CHARACTERS_PER_TOKEN = 16
"""Characters of a result that are tokenized for each token of its limit, so a megabyte is never tokenized."""

Progress = Callable[[int, int], None]
"""Function of the number of finished episodes and the number of all episodes."""


@dataclass(frozen=True)
class EpisodeTask:
    """An episode to play."""

    row: dict[str, Any]
    seed: int
    opening_seed: int | None = None
    """Seed of a user who speaks first, equal in episodes with the same beginning; None for the episode's seed."""


def episode_seed(seed: int, id: str, sample: int) -> int:
    """Return the seed of an episode, a non-negative int64 that does not depend on other rows."""
    return int(digest([seed, id, sample])[:15], 16)


def episode_tasks(rows: Sequence[dict[str, Any]], samples: int, seed: int, name: str) -> list[EpisodeTask]:
    """Return the tasks of ``samples`` episodes of each row, in order; ``name`` is the name of the split."""
    tasks: list[EpisodeTask] = []
    for row in rows:
        tasks += row_tasks(row, [episode_seed(seed, f"{name}/{row['id']}", sample) for sample in range(samples)])
    return tasks


def play_in_parts(
    play_part: Callable[[str, Sequence[EpisodeTask]], list[Episode]],
    name: str,
    rows: Sequence[dict[str, Any]],
    samples: int,
    seed: int,
) -> list[list[Episode]]:
    """Return ``samples`` episodes of each row, which are played in parts.

    Args:
        play_part: Plays a part, which has a separate name.
        name: Beginning of these names, different in each call.
        rows: Rows to play.
        samples: Episodes of each row.
        seed: Seed from which the seeds of episodes are derived.
    """
    tasks = episode_tasks(rows, samples, seed, name)
    episodes: list[Episode] = []
    for start in range(0, len(tasks), EPISODES_TOGETHER):
        episodes += play_part(f"{name}-{start:07d}", tasks[start : start + EPISODES_TOGETHER])
    return [episodes[start : start + samples] for start in range(0, len(episodes), samples)]


def row_tasks(row: dict[str, Any], seeds: Sequence[int]) -> list[EpisodeTask]:
    """Return a task of a row for each seed. A user who speaks first begins all of them with the same message."""
    return [EpisodeTask(row, seed, seeds[0]) for seed in seeds]


@dataclass
class EpisodePlayer:
    """Plays the episodes of one rollout with the environments of a pool; ``session`` samples the policy's turns."""

    pool: EnvironmentPool
    rules: EpisodeRules
    session: Session
    journal: Journal
    on_progress: Progress | None = None
    weights_update: int | None = None
    """Update of the engine's weights, for turns whose update the session does not report."""
    user: UserTurns | None = None
    """The simulated user; None if there is none."""
    _runs: list[EpisodeRun] = field(default_factory=list)
    _environments: list[JournaledEnvironment] = field(default_factory=list)
    _acting: dict[Future[Any], int] = field(default_factory=dict)
    """Running methods and requested turns of the user → index of their episode."""
    _finished: int = 0

    def play(self, tasks: Sequence[EpisodeTask]) -> list[Episode]:
        """Return an episode for each task, in order."""
        self._runs = [self._make_run(task) for task in tasks]
        self._environments = [
            JournaledEnvironment(self.pool, self.journal, index, task.row) for index, task in enumerate(tasks)
        ]
        try:
            for index in range(len(self._runs)):
                self._advance(index)
            while self._finished < len(self._runs):
                self._play_on()
        finally:
            # Close all episodes, because the next rollout uses the same numbers in the pool.
            wait([environment.close() for environment in self._environments])
        return [run.episode for run in self._runs]

    def _make_run(self, task: EpisodeTask) -> EpisodeRun:
        return EpisodeRun(task.row, task.seed, self.rules, task.opening_seed)

    def _play_on(self) -> None:
        """Process the results that have arrived, or wait for the next."""
        self._take_results()
        if self.user is not None and self._is_turn_of(self.user):
            self.user.send()
        elif self._acting and (self.session.is_lockstep or not self.session.pending):
            # A session in lockstep gets all turns of a round at once, so its batch, and with it the rounding, does not
            # depend on the speed of tools.
            wait(self._acting, return_when=FIRST_COMPLETED)
        elif self.session.pending:
            self._take_turns(self.session.poll(TURN_SECONDS if self._acting else None))

    def _is_turn_of(self, user: UserTurns) -> bool:
        """Return whether to send the waiting requests to the user now."""
        if not user.can_send:
            return False
        if user.in_background:
            return True
        # The user's model runs in this process. It answers all episodes of a round as one batch, when no tool
        # is running and no turn is being sampled. A session in lockstep samples its turns after that.
        return user.waiting == len(self._acting) and (self.session.is_lockstep or not self.session.pending)

    def _advance(self, index: int) -> None:
        """Continue an episode until it waits for the engine or its environment, or is over."""
        run = self._runs[index]
        while isinstance(run.action, SampleTurn):
            # A turn that was sampled before a kill is reused.
            stored = self.journal.get("turn", index, run.action.turn)
            if stored is None:
                action = run.action
                self.session.submit(TurnRequest(index, action.prompt, action.max_tokens, action.seed))
                return
            run.take_turn(PolicyTurn(**stored))
        # The result arrives in _take_results(), which continues the episode.
        if run.action is not None:
            self._acting[self._start(index, run.action)] = index
            return
        self._finished += 1
        if self.on_progress is not None:
            self.on_progress(self._finished, len(self._runs))

    def _start(self, index: int, act: Act) -> Future[Any]:
        environment = self._environments[index]
        if act.method == "reset":
            return environment.reset()
        if act.method == "call":
            return environment.call(act.turn, act.index, *act.arguments)
        if act.method == "step":
            return environment.step(act.turn, *act.arguments)
        if act.method == "user":
            assert self.user is not None
            return self.user.ask(index, act.turn, self._runs[index].row, *act.arguments)
        return environment.score(*act.arguments)

    def _take_results(self) -> None:
        """Process the results of finished methods."""
        for future in [future for future in self._acting if future.done()]:
            index = self._acting.pop(future)
            run = self._runs[index]
            assert isinstance(run.action, Act)
            try:
                result = future.result()
            except EnvironmentFailed as error:
                run.fail(f"{run.action.method}: {error}")
            else:
                run.take_result(result)
            self._advance(index)

    def _take_turns(self, responses: list[tuple[int, Response]]) -> None:
        """Process turns that were sampled together; one line of the journal has all of them."""
        turns = {index: self._turn(response) for index, response in sorted(responses, key=lambda pair: pair[0])}
        # All turns are on disk before any episode continues, because calls depend on these tokens.
        self.journal.put_all(
            (Position("turn", index, len(self._runs[index].episode.turns)), asdict(turn))
            for index, turn in turns.items()
        )
        for index, turn in turns.items():
            self._runs[index].take_turn(turn)
            self._advance(index)

    def _turn(self, response: Response) -> PolicyTurn:
        update = self.weights_update if response.weights_update is None else response.weights_update
        values = {entry.name: getattr(response, entry.name) for entry in fields(PolicyTurn)}
        return PolicyTurn(**values | {"weights_update": update})


class EnvironmentPlayer:
    """Plays the episodes of rows in an environment."""

    def __init__(
        self,
        config: EnvironmentConfig,
        source: EnvironmentSource,
        tokenizer: Any,
        max_prompt_tokens: int,
        where: str,
        user: SimulatedUser | None = None,
    ) -> None:
        """Prepare the rules of the episodes and the pool of environments.

        Args:
            config: The stage's ``environment``.
            source: The environment.
            tokenizer: Tokenizer of the policy.
            max_prompt_tokens: Longest prompt of an episode.
            where: Name of the stage, for messages.
            user: The model of ``config.user``; ``close`` closes it.

        Raises:
            UserError: The chat template has no place for the tools, or rewrites earlier turns.
        """
        if (config.user is None) != (user is None):
            raise ValueError("a simulated user needs its settings, and they need a user")
        self.config = config
        self.source = source
        self.tokenizer = tokenizer
        self.user = user
        self.where = where
        turns = TurnTemplate(tokenizer, source.tools or None, where)
        self.rules = EpisodeRules(
            turns=turns,
            call_format=tool_call_format(config.tool_format, turns.template) if source.tools else None,
            decode=self._decode,
            shorten=self._shorten,
            max_prompt_tokens=max_prompt_tokens,
            **limits(config, source.has_step),
        )
        self.training_template = turns.training
        """Name of the template that replaces the model's template if that rewrites earlier turns; otherwise empty."""
        self.pool = EnvironmentPool(source, config.workers, config.tool_seconds, config.isolation)
        self.cache_statistics: dict[str, float] | None = None
        """Use of the engine's prefix cache in the last call of ``play``; None if the engine does not report it."""

    def play(
        self,
        engine: Any,
        tasks: Sequence[EpisodeTask],
        *,
        temperature: float,
        journal: Journal | None = None,
        on_progress: Progress | None = None,
        weights_update: int | None = None,
        thinking_budget: int | None = None,
    ) -> list[Episode]:
        """Return an episode for each task, in order.

        ``weights_update`` is the update of the engine's weights; the session may report newer weights.
        """
        from align.inference.sessions import open_session  # imports torch

        session = ThinkingSession(open_session(engine, temperature), ThoughtReader(self.tokenizer), thinking_budget)
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
        """Return an episode for each task, in order, with turns from ``session``."""
        with contextlib.ExitStack() as stack:
            if journal is None:
                # No later run continues from this journal, but instances after a timeout are restored from it.
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="align-episodes-"))
                journal = Journal(Path(folder) / "episodes.jsonl")
            stack.callback(journal.close)
            read_prompt = partial(user_prompt, self.config, self.where)
            turns = None if self.user is None else UserTurns(self.user, read_prompt, journal)
            # Load the user before the policy's first turn, so a lack of memory shows immediately.
            self.load_user()
            player = EpisodePlayer(self.pool, self.rules, session, journal, on_progress, weights_update, turns)
            return player.play(tasks)

    def load_user(self) -> None:
        """Load the weights of a checkpoint that plays the user once."""
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
        """Return the use of the server that plays the user as ``user``; empty if there is no server."""
        return user_usage(self.user)

    def _decode(self, token_ids: list[int]) -> str:
        # Some formats mark calls with special tokens.
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _shorten(self, result: str) -> str:
        """Return a result cut at ``max_result_tokens``, with a notice of its length."""
        limit = self.config.max_result_tokens
        # A result that the environment has cut keeps its notice, so the model reads the original length.
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
    """Return the player of a stage's ``environment``; None if the stage has none.

    ``max_prompt_tokens`` defaults to the config's. ``UserResources`` explains ``outage_fails_episodes``.
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
