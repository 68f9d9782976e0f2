"""Rollouts drawn before they are learned from, so that servers sample while the trainer learns.

The rollout of an update is drawn with the weights that the policy had ``max_staleness`` updates earlier, never with
others: what is drawn depends on no clock, and is the same where nothing runs beside the trainer. That makes a run
repeatable, and lets a checkpoint keep what was drawn ahead. Left out: rollouts that go on across a change of weights,
and weights as new as there happen to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from align.inference.pool import PoolEngine
from align.inference.shared_engine import is_shared
from align.rl.rollout import Rollout

Weights = Iterable[tuple[str, torch.Tensor]]


class RolloutsAhead:
    """Gives out the rollouts of updates in their order; ``give`` and ``take`` are called once each for every update.

    Servers draw in a thread of their own. An engine in the trainer's process draws when it is asked, since both need
    the same cores: then nothing is saved, and the results are the same.
    """

    def __init__(self, engine: Any, draw: Callable[[int], Rollout | None], staleness: int, updates: int) -> None:
        """``draw(update)`` samples this process's part of an update's rollout from ``engine``, with the weights that it
        holds; None where others have it all. It asks no other process for anything, since it may run at any time."""
        self.engine, self._draw, self.staleness, self.updates = engine, draw, staleness, updates
        self._kept: dict[int, Future[Rollout | None]] = {}
        self._given = 0
        self._next: int | None = None
        """First update whose rollout nobody was asked for yet; None before the first."""
        self.beside = staleness > 0 and isinstance(engine, PoolEngine)
        """Whether rollouts are drawn while the trainer goes on."""
        self.shared = is_shared(engine)
        """Whether one process has all of every rollout, however many learn from it."""
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[Any] | None = None
        self._adopted: Future[None] | None = None
        """When the servers have read the weights given last. One that failed fails all that is begun behind it: later
        weights that are taken must not hide that rollouts came from older ones."""

    def give(self, update: int, weights: Weights) -> None:
        """The policy's weights before ``update``, for what is drawn from now on. They may change when this returns."""
        self._given = update
        if self.beside and self.engine.takes_folders:
            version = self.engine.write_weights(weights)
            self._last = self._adopted = self._beside(lambda: self.engine.adopt(version))
            return
        self.settle()
        self.engine.load_weights(weights)

    def settle(self) -> None:
        """Wait until the engine holds the weights given last, and nothing is drawn. Raises what went wrong there."""
        if self._last is not None:
            self._last.result()

    def take(self, update: int) -> Rollout | None:
        """The part of an update, waited for; what may be drawn with the weights given last is begun first."""
        begin = update if self._next is None else self._next
        end = min(update + self.staleness, self.updates - 1)
        for one in range(begin, end + 1):
            self._kept[one] = self._begin(one)
        self._next = max(begin, end + 1)
        return self._kept.pop(update).result()

    def _begin(self, update: int) -> Future[Rollout | None]:
        given = self._given

        def drawn() -> Rollout | None:
            began = time.perf_counter()
            rollout = self._draw(update)
            if rollout is not None:
                rollout.weights_of, rollout.drawing = given, time.perf_counter() - began
            return rollout

        if self.beside:
            self._last = begun = self._beside(drawn)
            return begun
        done: Future[Rollout | None] = Future()
        done.set_result(drawn())
        return done

    def _beside(self, do: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        adopted = self._adopted

        def do_with_weights() -> Any:
            if adopted is not None:
                adopted.result()  # done, since the thread is one; raises what the servers rejected the weights with
            return do()

        return self._thread.submit(do_with_weights)

    def close(self) -> None:
        """Draw nothing that was not begun; what is being drawn ends by itself, or with its engine."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread = self._last = None

    def state_dict(self) -> list[dict[str, Any]]:
        """What was drawn ahead, waited for, as it is kept in a checkpoint."""
        drawn = [self._kept[update].result() for update in sorted(self._kept)]
        return [_as_json(rollout) for rollout in drawn if rollout is not None]

    def load_state_dict(self, state: list[dict[str, Any]], restore: Callable[[int, list[Any]], Rollout | None]) -> None:
        """Take it back; ``restore(update, answers)`` makes this process's part of a rollout of all answers to it."""
        for kept in state:
            rollout = restore(kept["update"], [[_Answer(**one) for one in some] for some in kept["answers"]])
            if rollout is not None:
                rollout.weights_of, rollout.drawing = kept["weights_of"], kept["drawing"]
            done: Future[Rollout | None] = Future()
            done.set_result(rollout)
            self._kept[kept["update"]] = done
        if state:
            self._next = max(self._kept) + 1


class _Answer:
    """What ``rollout_of`` needs of an engine's response."""

    def __init__(self, token_ids: list[int], logprobs: list[float], finished: bool, text: str) -> None:
        self.token_ids, self.logprobs, self.finished, self.text = token_ids, logprobs, finished, text


def _as_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout before it is scored. Python's floats survive JSON exactly, and float32 survives Python's."""
    answers: dict[int, list[dict[str, Any]]] = {}
    for i, tokens in enumerate(rollout.responses):
        answer = {
            "token_ids": tokens,
            "logprobs": rollout.tensors["sampler_logprobs"][i, : len(tokens)].tolist(),
            "finished": bool(rollout.tensors["finished"][i]),
            "text": rollout.texts[i],
        }
        answers.setdefault(rollout.groups[i], []).append(answer)
    facts = {"update": rollout.update, "weights_of": rollout.weights_of, "drawing": rollout.drawing}
    return facts | {"answers": list(answers.values())}
