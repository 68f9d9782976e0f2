"""Models that the chat view keeps: each once, within the memory, and not longer than needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.studio import chat_models
from align.studio.chat_models import HEADROOM, WAITS, ModelPool, model_size


class Machine:
    """Memory for a number of models, and the models that were loaded."""

    def __init__(self, size: int, room: float) -> None:
        self.total = int(size * HEADROOM * room)
        self.size = size
        self.loaded: list[Path] = []
        self.pool = ModelPool(self.load, self.free, seconds_kept=60)

    def load(self, use: str, folder: Path) -> Any:
        self.loaded.append(folder)
        return object()

    def free(self) -> int:
        return self.total - int(self.size * HEADROOM) * len(self.pool.folders())


@pytest.fixture
def machine(tiny_model: Path) -> Callable[[float], Machine]:
    return lambda room: Machine(model_size(tiny_model), room)


@pytest.fixture
def folders(tiny_model: Path, tmp_path: Path) -> list[Path]:
    for name in "abc":
        (tmp_path / name).symlink_to(tiny_model)
    return [tmp_path / name for name in "abc"]


def test_a_model_is_loaded_once_for_all_users(machine: Callable[[float], Machine], folders: list[Path]) -> None:
    one = machine(3.1)
    started = threading.Event()
    original = one.pool._load

    def load_slowly(use: Any, folder: Path) -> Any:
        started.set()
        time.sleep(0.2)
        return original(use, folder)

    one.pool._load = load_slowly
    models: list[Any] = []

    def use() -> None:
        with one.pool.borrow("policy", folders[0]) as model:
            models.append(model)

    threads = [threading.Thread(target=use) for _ in range(3)]
    threads[0].start()
    started.wait(5)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert one.loaded == [folders[0]]
    assert len(models) == 3
    assert models[0] is models[1] is models[2]


def test_the_least_recently_used_model_makes_room(machine: Callable[[float], Machine], folders: list[Path]) -> None:
    two = machine(2.1)
    for folder in (folders[0], folders[1], folders[0], folders[2]):
        with two.pool.borrow("policy", folder):
            pass
    assert two.loaded == [folders[0], folders[1], folders[2]]
    assert set(two.pool.folders()) == {folders[0], folders[2]}


def test_a_reply_waits_until_memory_is_free(machine: Callable[[float], Machine], folders: list[Path]) -> None:
    single = machine(1.1)
    waits = threading.Event()
    done = threading.Event()

    def use() -> None:
        def report(text: str) -> None:
            if text == WAITS:
                waits.set()

        with single.pool.borrow("policy", folders[1], report):
            done.set()

    with single.pool.borrow("policy", folders[0]):
        thread = threading.Thread(target=use)
        thread.start()
        assert waits.wait(5)
        assert not done.is_set()
    assert done.wait(5)
    thread.join(5)
    assert single.pool.folders() == [folders[1]]


def test_waiting_ends_with_an_error_of_its_report(machine: Callable[[float], Machine], folders: list[Path]) -> None:
    single = machine(1.1)

    def stop(text: str) -> None:
        if text == WAITS:
            raise InterruptedError

    with (
        single.pool.borrow("policy", folders[0]),
        pytest.raises(InterruptedError),
        single.pool.borrow("policy", folders[1], stop),
    ):
        raise AssertionError("there is no memory for it")
    assert single.loaded == [folders[0]]


def test_a_model_larger_than_the_memory_is_refused(machine: Callable[[float], Machine], folders: list[Path]) -> None:
    refused = pytest.raises(UserError, match=r"needs .* GiB of memory.*align serve")
    with refused, machine(0.9).pool.borrow("policy", folders[0]):
        raise AssertionError("there is no memory for it")


def test_a_failed_load_is_told_and_tried_again(machine: Callable[[float], Machine], folders: list[Path]) -> None:
    one = machine(1.1)
    outcomes: list[Any] = [ValueError("odd weights"), "the model"]

    def load(use: Any, folder: Path) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    one.pool._load = load
    failure = pytest.raises(UserError, match="cannot be loaded: ValueError: odd weights")
    with failure, one.pool.borrow("policy", folders[0]):
        raise AssertionError("it was not loaded")
    with one.pool.borrow("policy", folders[0]) as model:
        assert model == "the model"


def test_models_are_freed_some_time_after_their_use(
    machine: Callable[[float], Machine], folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(chat_models, "release_memory", released.set)
    one = machine(3.1)
    one.pool._seconds_kept = 0.2
    with one.pool.borrow("policy", folders[0]):
        time.sleep(0.3)
        one.pool.free_unused()
        assert one.pool.folders() == [folders[0]], "a model in use stays"
    assert released.wait(5)
    assert one.pool.folders() == []


def test_real_models_fit_into_the_memory_of_this_machine(tiny_model: Path, tiny_reward: Path) -> None:
    pool = ModelPool()
    with pool.borrow("policy", tiny_model) as replier, pool.borrow("reward", tiny_reward) as reward:
        assert list(replier.reply([{"role": "user", "content": "Hi"}]))
        assert len(reward.score([[{"role": "user", "content": "Hi"}]], ["Yes"])) == 1
    assert set(pool.folders()) == {tiny_model, tiny_reward}
