"""Plays episodes: many at a time, each at its own pace, with one engine call for whatever turns are ready.

The loop has three sources of work. The session samples turns, the environments carry out their methods, and a simulated
user answers, where there is one. What comes back is in the journal before it is used, so a rollout that was killed
samples no turn and makes no call twice.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from align.config.batch_sizes import EPISODES_TOGETHER
from align.environments.episode import Episode, PolicyTurn
from align.environments.episode_run import Act, EpisodeRules, EpisodeRun, SampleTurn
from align.environments.errors import EnvironmentFailed
from align.environments.journal import Journal, Position
from align.environments.replay import JournaledEnvironment
from align.environments.user_turns import UserTurns
from align.environments.worker_pool import EnvironmentPool
from align.inference.protocol import Response, Session, TurnRequest
from align.store.fingerprint import digest

TURN_SECONDS = 0.05
"""Time that decoding goes on before the results of tools are looked at again."""

Progress = Callable[[int, int], None]
"""Called with (episodes finished, episodes wanted)."""


@dataclass(frozen=True)
class EpisodeTask:
    """An episode to play."""

    row: dict[str, Any]
    seed: int
    opening_seed: int | None = None
    """Seed of a user who speaks first, the same in episodes that are to begin alike; None for the episode's own."""


def episode_seed(seed: int, id: str, sample: int) -> int:
    """Return the seed of an episode, which other rows do not change; a non-negative int64."""
    return int(digest([seed, id, sample])[:15], 16)


def episode_tasks(rows: Sequence[dict[str, Any]], samples: int, seed: int, name: str) -> list[EpisodeTask]:
    """Return the tasks of ``samples`` episodes of each row, in order; ``name`` is that of the rows' split."""
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
    """Return ``samples`` episodes of each row, which ``play_part`` plays part by part under a name of its own.

    ``name`` tells these rows from those of other calls.
    """
    tasks = episode_tasks(rows, samples, seed, name)
    episodes: list[Episode] = []
    for start in range(0, len(tasks), EPISODES_TOGETHER):
        episodes += play_part(f"{name}-{start:07d}", tasks[start : start + EPISODES_TOGETHER])
    return [episodes[start : start + samples] for start in range(0, len(episodes), samples)]


def row_tasks(row: dict[str, Any], seeds: Sequence[int]) -> list[EpisodeTask]:
    """Return the tasks of a row's episodes, one for each seed. A user who speaks first begins all of them alike."""
    return [EpisodeTask(row, seed, seeds[0]) for seed in seeds]


class EpisodeSource(Protocol):
    """What plays the episodes of rows; the sampler of rollouts takes one."""

    cache_statistics: dict[str, float] | None
    """Use of the engine's prefix cache in the last call of ``play``; None where the engine does not tell."""

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
        """Return an episode for each task, in order.

        ``weights_update`` is the update whose weights the engine has; its session may know of newer ones.
        """
        ...


@dataclass
class EpisodePlayer:
    """Plays the episodes of one rollout with the environments of a pool; ``session`` samples the policy's turns."""

    pool: EnvironmentPool
    rules: EpisodeRules
    session: Session
    journal: Journal
    on_progress: Progress | None = None
    weights_update: int | None = None
    """Update whose weights sample turns of which the session says no other."""
    user: UserTurns | None = None
    """The simulated user, where the rules have one."""
    _runs: list[EpisodeRun] = field(default_factory=list)
    _environments: list[JournaledEnvironment] = field(default_factory=list)
    _acting: dict[Future[Any], int] = field(default_factory=dict)
    """Methods that are running, and turns of the user that are asked for → index of their episode."""
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
            # All are closed here: a pool's numbers of episodes begin anew in the next rollout.
            wait([environment.close() for environment in self._environments])
        return [run.episode for run in self._runs]

    def _make_run(self, task: EpisodeTask) -> EpisodeRun:
        return EpisodeRun(task.row, task.seed, self.rules, task.opening_seed)

    def _play_on(self) -> None:
        """Take what has come back; wait where nothing has."""
        self._take_results()
        if self.user is not None and self._is_turn_of(self.user):
            self.user.send()
        elif self._acting and (self.session.is_lockstep or not self.session.pending):
            # A session that samples in lockstep gets all turns of a round at once: its batch, and so its rounding, then
            # does not depend on how fast tools are.
            wait(self._acting, return_when=FIRST_COMPLETED)
        elif self.session.pending:
            self._take_turns(self.session.poll(TURN_SECONDS if self._acting else None))

    def _is_turn_of(self, user: UserTurns) -> bool:
        """Return whether the user answers now what it is asked for."""
        if not user.can_send:
            return False
        if user.in_background:
            return True
        # The user's model takes this process. It answers all episodes of a round as one batch, once no tool is running
        # and no turn is sampled; a session in lockstep samples its turns after that.
        return user.waiting == len(self._acting) and (self.session.is_lockstep or not self.session.pending)

    def _advance(self, index: int) -> None:
        """Carry an episode on until it waits for the engine or its environment, or is over."""
        run = self._runs[index]
        while isinstance(run.action, SampleTurn):
            # A turn from before a kill is used as it was sampled.
            stored = self.journal.get("turn", index, run.action.turn)
            if stored is None:
                action = run.action
                self.session.submit(TurnRequest(index, action.prompt, action.max_tokens, action.seed))
                return
            run.take_turn(PolicyTurn(**stored))
        # The result arrives in _take_results(), which carries the episode on.
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
        """Take the results of methods that are done."""
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
        """Take turns that were sampled together, and write them down together."""
        turns = {index: self._turn(response) for index, response in sorted(responses, key=lambda pair: pair[0])}
        # All turns are on disk before any episode goes on, since calls build on these tokens.
        self.journal.put_all(
            (Position("turn", index, len(self._runs[index].episode.turns)), asdict(turn))
            for index, turn in turns.items()
        )
        for index, turn in turns.items():
            self._runs[index].take_turn(turn)
            self._advance(index)

    def _turn(self, response: Response) -> PolicyTurn:
        update = self.weights_update if response.weights_update is None else response.weights_update
        return PolicyTurn(response.token_ids, response.logprobs, response.finished, response.text, update)
