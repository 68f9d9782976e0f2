"""Sample rollouts ahead of learning, so servers sample while the trainer learns.

With ``in_flight: wait`` the rollout of an update is sampled with the weights that the policy had ``max_staleness``
updates earlier, never with others. So results do not depend on a clock or on sampling in the background: runs are
repeatable, and a checkpoint stores the prefetched rollouts. With ``in_flight: continue`` servers load newer weights
between the turns of episodes, and a checkpoint leaves rollouts in progress to their journal. Weights never change
within a turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from align.environments.episode import Episode
from align.inference.protocol import Response
from align.inference.servers.pool import PoolEngine
from align.inference.trainer_engine import is_shared
from align.inference.weights import Weights
from align.rl.rollout import Rollout

InFlight = Literal["wait", "continue"]


class RolloutPrefetcher:
    """Returns the rollouts of updates in their order. Call ``set_weights`` and ``get`` once each for every update.

    Servers sample in a background thread. An engine in the trainer's process samples when it is asked, since both need
    the same cores: this saves no time, and the results are the same.
    """

    def __init__(
        self,
        engine: Any,
        sample: Callable[[int, int], Rollout | None],
        staleness: int,
        updates: int,
        in_flight: InFlight = "wait",
    ) -> None:
        """``sample(update, weights_update)`` returns this process's part of an update's rollout, sampled from
        ``engine`` with the weights that it holds, which the policy had before ``weights_update``; None if other
        processes sample all of it. It may run at any time, so it must not communicate with other processes."""
        self.engine = engine
        self._sample = sample
        self.staleness = staleness
        self.updates = updates
        self.in_flight = in_flight
        self._rollouts: dict[int, Future[Rollout | None]] = {}
        """Rollouts that were begun and not yet returned, by update."""
        self._weights_update = 0
        """Update that the engine's weights were set for."""
        self._next_update: int | None = None
        """First update whose rollout has not been begun; None before the first."""
        self.in_background = staleness > 0 and isinstance(engine, PoolEngine)
        """True if rollouts are sampled while the trainer learns."""
        self.shared_engine = is_shared(engine)
        """True if one process has all of every rollout, however many learn from it."""
        self.is_waiting = False
        """True while ``get`` samples or waits for a rollout."""
        self._thread: ThreadPoolExecutor | None = None
        self._last_job: Future[Any] | None = None
        self._adoption: Future[None] | None = None
        """The job that loads the last weights into the servers. If it failed, all jobs behind it fail: weights that are
        loaded later must not hide that rollouts came from older weights."""

    def set_weights(self, update: int, weights: Weights) -> None:
        """Give the engine the policy's weights before ``update``, for all later sampling.

        The weights may change once this returns.
        """
        self._weights_update = update
        if self.in_background and self.engine.takes_folders:
            # Write the weights now, because training will change them. They are loaded after the rollouts in progress.
            version = self.engine.write_weights(weights)
            if self.in_flight == "continue":
                self.engine.offer(version, update)
            self._last_job = self._adoption = self._submit(lambda: self.engine.adopt(version))
            return
        self.wait()  # a rollout must not be sampled with two versions of the weights
        self.engine.load_weights(weights)

    def continuing_objection(self) -> str | None:
        """Return why the engine cannot load new weights between turns, and the remedy; None if it can."""
        if not self.shared_engine:
            return f"engine {self.engine.name} samples in this process. Pass an engine of vLLM servers"
        if isinstance(self.engine, PoolEngine) and not self.engine.takes_folders:
            return "its servers get weights over NCCL, while none of them samples. Take `weights: folder`"
        return None

    def wait(self) -> None:
        """Wait until the engine holds the last weights and is idle. Raises the background job's error."""
        if self._last_job is not None:
            self._last_job.result()

    def get(self, update: int) -> Rollout | None:
        """Return this process's part of an update's rollout; begin all that the current weights may sample first."""
        self.is_waiting = True
        try:
            rollout = self._begin_and_wait(update)
        finally:
            self.is_waiting = False
        if rollout is not None:
            self._check_staleness(rollout)
        return rollout

    def _begin_and_wait(self, update: int) -> Rollout | None:
        begin = update if self._next_update is None else self._next_update
        # With staleness s, the weights before ``update`` may sample up to ``update + s``. At the first call that is
        # s + 1 rollouts, later one per call.
        end = min(update + self.staleness, self.updates - 1)
        for upcoming in range(begin, end + 1):
            self._rollouts[upcoming] = self._begin(upcoming)
        self._next_update = max(begin, end + 1)
        # This waits for the background thread, and raises what went wrong there.
        return self._rollouts.pop(update).result()

    def _check_staleness(self, rollout: Rollout) -> None:
        """Raise ``RuntimeError`` if a token is older than ``staleness`` updates, or newer than the rollout."""
        ages = rollout.staleness
        if ages.numel() and not 0 <= int(ages.min()) <= int(ages.max()) <= self.staleness:
            raise RuntimeError(
                f"the rollout of update {rollout.update + 1} has tokens of weights that are {int(ages.min())} to "
                f"{int(ages.max())} updates old, and max_staleness is {self.staleness}"
            )

    def _begin(self, update: int) -> Future[Rollout | None]:
        # Read the update now, not in the job, because newer weights may be set before the job runs.
        weights_update = self._weights_update

        def sample() -> Rollout | None:
            started = time.perf_counter()
            rollout = self._sample(update, weights_update)
            if rollout is not None:
                rollout.sampling_seconds = time.perf_counter() - started
            return rollout

        if self.in_background:
            self._last_job = job = self._submit(sample)
            return job
        return _completed(sample())

    def _submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Run ``job`` in the background thread, behind the jobs before it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        adoption = self._adoption

        def run_with_weights() -> Any:
            if adoption is not None:
                adoption.result()  # done, since there is one thread; raises if the servers rejected the weights
            return job()

        return self._thread.submit(run_with_weights)

    def close(self) -> None:
        """Drop jobs that have not begun. A running job ends by itself, or with its engine."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread = self._last_job = None

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the prefetched rollouts as JSON, after waiting for the rollouts in progress.

        With ``in_flight: continue`` rollouts in progress are skipped, because waiting would finish them with the old
        weights. A resumed run plays them from their journals.
        """
        futures = [self._rollouts[update] for update in sorted(self._rollouts)]
        if self.in_flight == "continue":
            futures = [future for future in futures if future.done()]
        rollouts = [future.result() for future in futures]
        return [_to_json(rollout) for rollout in rollouts if rollout is not None]

    def load_state_dict(
        self, state: list[dict[str, Any]], restore: Callable[[int, list[Any], int], Rollout | None]
    ) -> None:
        """Restore prefetched rollouts; ``restore(update, responses, weights_update)`` returns this process's part."""
        for entry in state:
            responses = [[_from_json(response) for response in group] for group in entry["answers"]]
            rollout = restore(entry["update"], responses, entry["weights_of"])
            if rollout is not None:
                rollout.sampling_seconds = entry["drawing"]
            self._rollouts[entry["update"]] = _completed(rollout)
        if state:
            # get() starts sampling after the rollouts that the checkpoint had.
            self._next_update = max(self._rollouts) + 1


def _completed(rollout: Rollout | None) -> Future[Rollout | None]:
    future: Future[Rollout | None] = Future()
    future.set_result(rollout)
    return future


def _from_json(response: dict[str, Any]) -> Any:
    """Return an episode, or an object with the attributes of an engine's response that ``make_rollout`` reads."""
    return Episode.from_json(response) if "turns" in response else Response(**response)


def _to_json(rollout: Rollout) -> dict[str, Any]:
    """Return a rollout that is not scored yet. Python's floats survive JSON exactly, and float32 survives Python's."""
    responses: dict[int, list[dict[str, Any]]] = {}
    for i, tokens in enumerate(rollout.responses):
        if rollout.episodes is not None:
            responses.setdefault(rollout.groups[i], []).append(rollout.episodes[i].to_json())
            continue
        response = {
            "token_ids": tokens,
            "logprobs": rollout.tensors["sampler_logprobs"][i, : len(tokens)].tolist(),
            "finished": bool(rollout.tensors["finished"][i]),
            "text": rollout.texts[i],
        }
        if rollout.has_thoughts:
            response |= {
                "thought_tokens": int(rollout.tensors["thought_tokens"][i]),
                "thought_end": int(rollout.tensors["thought_end"][i]),
                "is_open": bool(rollout.tensors["open_thought"][i]),
                "forced": rollout.tensors["forced"][i].nonzero()[:, 0].tolist(),
            }
        responses.setdefault(rollout.groups[i], []).append(response)
    # Turns of episodes have their own update. This update is for responses, and for turns by an older version.
    weights_update = rollout.update - int(rollout.staleness.max())
    facts = {"update": rollout.update, "weights_of": weights_update, "drawing": rollout.sampling_seconds}
    return facts | {"answers": list(responses.values())}
