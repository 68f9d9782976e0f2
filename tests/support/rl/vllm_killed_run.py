"""Lives of a run with vLLM, each ended by SIGKILL at a given point.

``python -m tests.support.rl.vllm_killed_run POLICY REWARD PLAN``, with a plan in
JSON, ``[[folder, updates, [point, ...]], ...]``:
in each folder one life for each point, and one that goes on to the end. A point is ``syncing:N``, ``sampling:N`` or
``learning:N``: within the Nth change of weights, rollout or optimizer step of that life. A process holds one engine, so
each life is a process; they share the imports, which take longest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from align.config.runtime import EngineConfig, Runtime
from align.inference.engine import open_engine
from align.inference.vllm import why_unusable
from tests.support.rl.killed_run import FIELDS, main

MIDDLE = 6
"""Of the decoding steps of a rollout, and of the tensors of a change of weights: where it dies."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal:
    """The engine, noting what vLLM is asked for and dying at a point."""

    def __init__(self, policy: Path, request: Path, place: str, number: int) -> None:
        runtime = Runtime(device="cpu", threads=1, engine=EngineConfig(name="vllm", cpu_kv_cache_gb=0.1))
        engine: Any = open_engine(policy, runtime, precision="float32", max_length=128, seed=7, warn=print)
        assert engine.name == "vllm"
        self.engine, self.asked, self.place, self.left = engine, request, place, number
        self.runs = engine._run
        self.steps = engine.steps.step
        engine._run = self.note
        engine.steps.step = self.step
        self.name, self.generate, self.score_tokens = engine.name, engine.generate, engine.score_tokens
        self.step_left = 0

    def note(self, call: str, prompts: Any, params: Any, on_progress: Any = None) -> Any:
        """Write down each request's prompt and seed, just as vLLM is handed them: a line for each call."""
        requests = [(prompt, param.seed) for prompt, param in zip(prompts, params, strict=True)]
        with self.asked.open("a") as file:
            file.write(json.dumps(requests) + "\n")
        if len(requests) == FIELDS["rollout_batch"] and self.is_now("sampling"):
            self.step_left = MIDDLE
        return self.runs(call, prompts, params, on_progress)

    def step(self) -> Any:
        if self.step_left == 1:
            die()
        self.step_left -= 1
        return self.steps()

    def load_weights(self, weights: Any) -> None:
        now = self.is_now("syncing")

        def some() -> Any:
            for count, pair in enumerate(weights):
                if now and count == MIDDLE:
                    die()
                yield pair

        self.engine.load_weights(some())

    def is_now(self, place: str) -> bool:
        self.left -= place == self.place
        return place == self.place and self.left == 0


def live(policy: Path, reward: Path, folder: Path, updates: int, point: str) -> None:
    """One life; it must end as planned."""
    child = os.fork()
    if child == 0:
        try:
            place, _, number = point.partition(":")
            engine = Mortal(policy, folder / "asked.jsonl", place, int(number or 0))
            main(policy, reward, folder, updates, engine, int(number) if place == "learning" else 0)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signal.SIGKILL if point else 0), f"the life that was to end at '{point}' ended with {code}"


if __name__ == "__main__":
    assert why_unusable() is None
    for folder, updates, points in json.loads(sys.argv[3]):
        Path(folder).mkdir()
        for point in [*points, ""]:
            live(Path(sys.argv[1]), Path(sys.argv[2]), Path(folder), updates, point)
