"""Players: episodes at their own pace, turns of a user, and the rules of an environment's settings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from align.config.environment import EnvironmentConfig
from align.environments import player as player_module
from align.environments.episode import Episode
from align.environments.episode_run import UserRules
from align.environments.journal import Journal
from align.environments.player import EnvironmentPlayer, EpisodePlayer, EpisodeTask, episode_tasks, play_in_parts
from align.environments.simulated_user import UserTurns
from align.environments.sources import open_environment
from align.environments.worker_pool import EnvironmentPool
from align.inference.protocol import Response, TurnRequest
from align.models.loading import load_tokenizer
from tests.support.environments.buttons import FORMAT, TEMPLATE
from tests.support.environments.letters import EOS, letter_rules
from tests.support.environments.opened import open_block
from tests.support.environments.users import ScriptedUser

TASKS = [EpisodeTask({"id": str(number), "prompt": "Hi"}, number) for number in range(4)]


class OneByOne:
    """A session that is not in lockstep: every poll returns the turn that was submitted first."""

    is_lockstep = False

    def __init__(self, say: Callable[[TurnRequest], str]) -> None:
        self._say = say
        self._requests: list[TurnRequest] = []
        self.sampled: list[int] = []
        """Episodes whose turns were sampled, in order."""

    @property
    def pending(self) -> int:
        """Turns in flight."""
        return len(self._requests)

    def submit(self, request: TurnRequest) -> None:
        """Take a turn."""
        self._requests.append(request)

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """Return the first turn."""
        request = self._requests.pop(0)
        self.sampled.append(request.key)
        text = self._say(request)
        ids = [*map(ord, text), EOS]
        return [(request.key, Response(ids, [-1.0] * len(ids), True, text))]

    def cache_statistics(self) -> dict[str, float] | None:
        """Return None."""
        return None

    def close(self) -> None:
        """Do nothing."""


def test_the_episodes_of_a_row_have_one_opening_seed() -> None:
    rows = [{"id": "a"}, {"id": "b"}]
    first, second, third, fourth = episode_tasks(rows, 2, 3, "train")
    assert first.opening_seed == second.opening_seed and third.opening_seed == fourth.opening_seed
    assert first.opening_seed != third.opening_seed
    assert len({task.seed for task in (first, second, third, fourth)}) == 4
    assert episode_tasks(rows[1:], 3, 3, "train")[:2] == [third, fourth], "neither others nor their number change it"


@pytest.fixture
def pool() -> Iterator[EnvironmentPool]:
    block = {"score": "tests.support.environments.tools:by_messages", "user": {"model": "sft", "prompt": "You."}}
    opened = EnvironmentPool(open_block(block))
    yield opened
    opened.close()


def play(pool: EnvironmentPool, session: OneByOne, user: ScriptedUser, folder: Path) -> list[Any]:
    rules = letter_rules(call_format=None, user=UserRules("BYE", opens=False))
    journal = Journal(folder / "journal")
    turns = UserTurns(user, lambda row: "You.", journal)
    return EpisodePlayer(pool, rules, session, journal, user=turns).play(TASKS)


def test_local_user_answers_between_sampled_turns(pool: EnvironmentPool, tmp_path: Path) -> None:
    session = OneByOne(lambda request: "Yes?")
    pending: list[int] = []

    def say(request: Any) -> str:
        pending.append(session.pending)
        return "go on" if request.turn == 1 else "BYE"

    user = ScriptedUser(say)
    episodes = play(pool, session, user, tmp_path)
    assert [[request.episode for request in batch] for batch in user.batches] == [[0, 1, 2, 3]] * 2
    assert not any(pending)
    for episode in episodes:
        assert episode.stop == "finished" and episode.user_answers == ["go on", "BYE"]
        assert episode.score == 4.0  # the messages: two of each


def test_a_user_elsewhere_holds_up_its_episodes_alone(pool: EnvironmentPool, tmp_path: Path) -> None:
    asked, sampled = threading.Event(), threading.Event()
    turns: list[int] = []

    def speak(request: TurnRequest) -> str:
        # The episode that speaks first, whichever it is, is at its user when the others are sampled.
        turns.append(request.key)
        if len(turns) > 1:
            assert asked.wait(20)
        if len(turns) == len(TASKS):
            sampled.set()
        return "Yes?"

    def answer(request: Any) -> str:
        asked.set()
        assert sampled.wait(20)
        return "BYE"

    episodes = play(pool, OneByOne(speak), ScriptedUser(answer, in_background=True), tmp_path)
    assert all(episode.user_answers == ["BYE"] for episode in episodes)


def test_user_error_ends_rollout_with_turns_in_flight(pool: EnvironmentPool, tmp_path: Path) -> None:
    def refuse(request: Any) -> str:
        raise RuntimeError("no budget")

    def speak(request: TurnRequest) -> str:
        time.sleep(0.02)
        return "Yes?"

    with pytest.raises(RuntimeError, match="no budget"):
        play(pool, OneByOne(speak), ScriptedUser(refuse, in_background=True), tmp_path)


def test_parts_are_played_in_order_and_grouped_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(player_module, "EPISODES_TOGETHER", 4)
    rows = [{"id": str(number)} for number in range(3)]
    parts: list[tuple[str, int]] = []

    def play_part(name: str, tasks: Sequence[EpisodeTask]) -> list[Episode]:
        parts.append((name, len(tasks)))
        return [Episode([int(task.row["id"])]) for task in tasks]

    groups = play_in_parts(play_part, "train", rows, samples=2, seed=7)
    # Six episodes in parts of four; the second row's two are in the first part, the third row's in the second.
    assert parts == [("train-0000000", 4), ("train-0000004", 2)]
    assert [[episode.prompt_ids for episode in group] for group in groups] == [[[0]] * 2, [[1]] * 2, [[2]] * 2]


BUTTONS = {"class": "tests.support.environments.buttons:Buttons", "tool_format": FORMAT, "max_tokens": 60}


@pytest.mark.parametrize(("fields", "most"), [({"turn_max_tokens": 8}, 8), ({}, 60)])
def test_turn_limit_defaults_to_the_limit_of_the_episode(fields: dict[str, Any], most: int, tiny_model: Path) -> None:
    config = EnvironmentConfig.model_validate(BUTTONS | fields)
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = TEMPLATE
    player = EnvironmentPlayer(config, open_environment(config), tokenizer, 64, "test")
    try:
        assert (player.rules.turn_max_tokens, player.rules.max_tokens) == (most, 60)
    finally:
        player.close()
