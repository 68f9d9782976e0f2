"""Rollouts by engines on several nodes of a Ray cluster: each answers a share of the prompts.

Every response has a seed from its prompt's place in the whole, so the shares change nothing about it. An engine whose
node dies is opened again on another and takes the weights that the others hold before it answers. Left out: servers
over HTTP, which need no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from align.config.runtime import Runtime
from align.config.validation import validate_plain
from align.errors import UserError
from align.inference import ray_client
from align.inference.protocol import Progress, Response, RolloutEngine, Sampling
from align.models.precision import Precision

SHARES = 4
"""Shares for each engine: one that is slow, or comes late, takes fewer."""
RETRIES = 3
"""How often a share is given to another engine after one died with it."""


@dataclass(frozen=True)
class Part(Sampling):
    """Sampling for prompts that are part of a longer list, from place ``first`` on."""

    first: int = 0

    def request_seed(self, prompt: int, sample: int) -> int:
        """As in the whole list."""
        return super().request_seed(prompt if self.seeds is not None else self.first + prompt, sample)


def part_of(sampling: Sampling, first: int, count: int) -> Part:
    """``sampling`` for the prompts ``first`` to ``first + count`` of its list."""
    seeds = None if sampling.seeds is None else sampling.seeds[first : first + count]
    return Part(**{**asdict(sampling), "seeds": seeds, "first": first})


class Shard:
    """One engine, an actor of Ray."""

    def __init__(
        self, model_dir: str, runtime: dict[str, Any], precision: Precision, max_length: int, seed: int
    ) -> None:
        from align.inference.engine import open_engine

        if not Path(model_dir).is_dir():
            raise RuntimeError(f"this node does not see {model_dir}; all nodes must see the store under the same path")
        self.said: list[str] = []
        self.engine: RolloutEngine = open_engine(
            Path(model_dir), validate_plain(Runtime, runtime), precision=precision, max_length=max_length, seed=seed,
            warn=self.said.append,
        )  # fmt: skip
        self.version = 0

    def about(self) -> tuple[str, str, list[str]]:
        """The engine's name, the type that it computes in, and what it warns of."""
        return self.engine.name, str(self.engine.dtype).removeprefix("torch."), self.said

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, version: int, weights: list[Any]
    ) -> list[list[dict[str, Any]]]:
        """Responses as plain values, under the weights of ``version``, whose reference is the one of ``weights``."""
        self._hold(version, weights)
        return [[asdict(response) for response in some] for some in self.engine.generate(prompts, sampling)]

    def score(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float, version: int, weights: list[Any]
    ) -> list[list[float]]:
        """The engine's log-probabilities of given tokens."""
        self._hold(version, weights)
        return self.engine.score_tokens(prompts, responses, temperature)

    def _hold(self, version: int, weights: list[Any]) -> None:
        if version != self.version:
            found = ray_client.require_ray().get(weights[0])
            self.engine.load_weights((name, torch.as_tensor(tensor)) for name, tensor in found)
            self.version = version


class RayEngine:
    """A :class:`~align.inference.protocol.RolloutEngine` around engines of a Ray cluster."""

    def __init__(
        self, model_dir: Path, runtime: Runtime, precision: Precision, max_length: int, seed: int,
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Open ``runtime.ray.samplers.count`` engines; raises ``UserError`` where the cluster cannot hold one."""
        block = runtime.ray.samplers
        self.connection = ray_client.connected(runtime.ray.address)
        self.ray = self.connection.__enter__()
        self.version, self.weights = 0, [None]
        try:
            needs = {"CPU": block.cpus, "GPU": block.gpus, **block.resources}
            needs = {name: amount for name, amount in needs.items() if amount}
            if not ray_client.could_ever_hold(self.ray, needs):
                said = ", ".join(f"{name} {amount:g}" for name, amount in needs.items())
                raise UserError(f"runtime.ray.samplers: no node of the Ray cluster has what each asks for ({said}).")
            here = replace_samplers(runtime)
            options = {
                "num_cpus": block.cpus, "num_gpus": block.gpus, "resources": dict(block.resources),
                "max_restarts": RETRIES, "max_task_retries": RETRIES,
            }  # fmt: skip
            made = self.ray.remote(Shard).options(**options)
            words = (str(model_dir.resolve()), here.model_dump(mode="json"), precision, max_length, seed)
            self.actors = [made.remote(*words) for _ in range(block.count)]
            self.name, dtype, said_there = self._first_ready(runtime.engine.timeout)
            self.dtype = getattr(torch, dtype)
            for text in said_there:
                warn(text)
        except BaseException:
            self.close()
            raise

    def _first_ready(self, seconds: float) -> tuple[str, str, list[str]]:
        """What the first engine that is open says of itself; the others may come later."""
        asked = [actor.about.remote() for actor in self.actors]
        done, _ = self.ray.wait(asked, num_returns=1, timeout=seconds)
        if not done:
            raise RuntimeError(f"no engine opened on the Ray cluster within {seconds:.0f} s (runtime.engine.timeout)")
        found: tuple[str, str, list[str]] = self.ray.get(done[0])
        return found

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """See the protocol."""

        def start(actor: Any, first: int, last: int) -> Any:
            part = part_of(sampling, first, last - first)
            return actor.generate.remote(prompts[first:last], part, self.version, self.weights)

        def count(answered: int) -> None:
            if on_progress is not None:
                on_progress(answered * sampling.n, len(prompts) * sampling.n)

        found = self._shared_out(len(prompts), start, count)
        return [[Response(**one) for one in some] for some in found]

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """See the protocol."""

        def start(actor: Any, first: int, last: int) -> Any:
            given = (prompts[first:last], responses[first:last], temperature, self.version, self.weights)
            return actor.score.remote(*given)

        return self._shared_out(len(prompts), start, lambda answered: None)

    def _shared_out(self, count: int, start: Callable[[Any, int, int], Any], told: Callable[[int], None]) -> list[Any]:
        """Shares of ``count`` prompts to whichever engine is free; their answers in order."""
        size = max(1, -(-count // (SHARES * len(self.actors))))
        waiting = [(first, min(first + size, count)) for first in range(0, count, size)]
        answers: dict[int, list[Any]] = {}
        under_way: dict[Any, tuple[Any, tuple[int, int]]] = {}
        free, losses = list(self.actors), 0
        while waiting or under_way:
            while waiting and free:
                actor, share = free.pop(0), waiting.pop(0)
                under_way[start(actor, *share)] = (actor, share)
            (done, *_), _ = self.ray.wait(list(under_way), num_returns=1)
            actor, share = under_way.pop(done)
            try:
                answers[share[0]] = self.ray.get(done)
            except self.ray.exceptions.RayActorError as error:
                losses += 1
                if losses > RETRIES * len(self.actors):
                    raise RuntimeError(f"engines on the Ray cluster died {losses} times: {error}") from None
                waiting.insert(0, share)
                time.sleep(1.0)
            else:
                told(sum(map(len, answers.values())))
            free.append(actor)
        return [answer for first in sorted(answers) for answer in answers[first]]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See the protocol. They are put into Ray once; each engine takes them before it answers next."""
        held = [(name, tensor.detach().cpu().contiguous()) for name, tensor in weights]
        self.weights = [self.ray.put(held)]
        self.version += 1

    def close(self) -> None:
        """End the engines, and the connection."""
        self.connection.__exit__(None, None, None)


def replace_samplers(runtime: Runtime) -> Runtime:
    """What holds for one engine: it samples in its own process."""
    block = runtime.ray.samplers.model_copy(update={"count": 0})
    threads = runtime.threads or max(1, int(runtime.ray.samplers.cpus))
    return runtime.model_copy(update={"ray": runtime.ray.model_copy(update={"samplers": block}), "threads": threads})


__all__ = ["Part", "RayEngine", "Shard", "part_of"]
