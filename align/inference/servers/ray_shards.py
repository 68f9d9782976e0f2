"""Rollouts by engines on several nodes of a Ray cluster: each samples for a share of the prompts.

Every response has a seed from its prompt's position in the whole list, so the shares change no response. An engine
whose node dies is opened again on another node, and reads the current weights before it samples. Leaves out servers
over HTTP, which need no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from align.config.runtime import Runtime
from align.config.runtime.executor import LocalExecutor, RayExecutor
from align.config.validation import validate_plain
from align.errors import UserError
from align.inference import ray_client
from align.inference.protocol import EngineSpec, Progress, Response, RolloutEngine, Sampling, TurnRequest
from align.inference.sessions import open_session
from align.inference.weights import AdaptedWeights, Weights

SHARES = 4
"""Shares for each engine: an engine that is slow, or comes late, gets fewer."""
RETRIES = 3
"""Times that an engine may die, on average, before the call fails."""

EngineOpener = Callable[..., RolloutEngine]
"""``align.inference.engine.open_engine``."""


@dataclass(frozen=True)
class ShardSampling(Sampling):
    """Sampling for prompts that are part of a longer list, from index ``first`` on."""

    first: int = 0

    def request_seed(self, prompt: int, sample: int) -> int:
        """Return the seed that the response has in the whole list."""
        return super().request_seed(prompt if self.seeds is not None else self.first + prompt, sample)


def shard_sampling(sampling: Sampling, first: int, count: int) -> ShardSampling:
    """Return ``sampling`` for the prompts ``first`` to ``first + count`` of its list."""
    seeds = None if sampling.seeds is None else sampling.seeds[first : first + count]
    return ShardSampling(**{**asdict(sampling), "seeds": seeds, "first": first})


class Shard:
    """One engine, as a Ray actor. Arguments and results are plain values, so any node can read them."""

    def __init__(self, settings: dict[str, Any], open_engine: EngineOpener) -> None:
        """Open the engine; ``settings`` are an ``EngineSpec``'s, with the runtime as JSON."""
        model_dir = Path(settings["model_dir"])
        if not model_dir.is_dir():
            raise RuntimeError(f"this node does not see {model_dir}; all nodes must see the store under the same path")
        self.warnings: list[str] = []
        self.engine = open_engine(
            model_dir,
            validate_plain(Runtime, settings["runtime"]),
            precision=settings["precision"],
            max_length=settings["max_length"],
            seed=settings["seed"],
            warn=self.warnings.append,
        )
        self.version = 0

    def about(self) -> tuple[str, str, list[str]]:
        """Return the engine's name, its compute type, and its warnings."""
        return self.engine.name, str(self.engine.dtype).removeprefix("torch."), self.warnings

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, version: int, weights: list[Any]
    ) -> list[list[dict[str, Any]]]:
        """Return responses under the weights of ``version``; ``weights`` holds Ray's reference to them."""
        self._take_weights(version, weights)
        return [[asdict(response) for response in row] for row in self.engine.generate(prompts, sampling)]

    def sample(
        self, requests: list[TurnRequest], temperature: float, top_p: float, version: int, weights: list[Any]
    ) -> list[dict[str, Any]]:
        """Return the responses to ``requests`` under the weights of ``version``; each has its own seed and limit."""
        self._take_weights(version, weights)
        session = open_session(self.engine, temperature, top_p)
        try:
            for request in requests:
                session.submit(request)
            responses: dict[int, Response] = {}
            while session.pending:
                responses.update(session.poll())
        finally:
            session.close()
        return [asdict(responses[request.key]) for request in requests]

    def score(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float, version: int, weights: list[Any]
    ) -> list[list[float]]:
        """Return the engine's log-probabilities of response tokens under the weights of ``version``."""
        self._take_weights(version, weights)
        return self.engine.score_tokens(prompts, responses, temperature)

    def _take_weights(self, version: int, weights: list[Any]) -> None:
        """Load weights before a call that needs them. An actor that was restarted holds version 0."""
        if version == self.version:
            return
        get = ray_client.require_ray().get
        tensors = ((name, torch.as_tensor(tensor)) for name, tensor in get(weights[0]))
        if len(weights) == 1:
            self.engine.load_weights(tensors)
        else:
            _, key, base = weights
            self.engine.load_weights(AdaptedWeights(key, lambda: iter(get(base)), dict(tensors)))
        self.version = version


class RayEngine:
    """A :class:`~align.inference.protocol.RolloutEngine` around engines of a Ray cluster."""

    def __init__(self, spec: EngineSpec, open_engine: EngineOpener, warn: Callable[[str], None]) -> None:
        """Open ``runtime.executor.samplers.count`` engines; raises ``UserError`` if the cluster cannot hold one."""
        executor = spec.runtime.executor
        assert isinstance(executor, RayExecutor)  # no other executor has samplers
        self.connection = ray_client.connected(executor.address)
        self.ray = self.connection.__enter__()
        self.version = 0
        # The reference is wrapped in a list, because Ray resolves references that are arguments themselves: each call
        # would copy all weights, also to an engine that has them. An adapter is followed by its base's number and
        # reference.
        self.weights: list[Any] = [None]
        self.base: tuple[object, list[Any]] | None = None
        """Key of the base that Ray holds; its number and reference."""
        try:
            self.actors = self._start_actors(spec, open_engine)
            self.name, dtype, warnings = self._await_first(spec.runtime.engine.timeout)
            self.dtype = getattr(torch, dtype)
            for text in warnings:
                warn(text)
        except BaseException:
            self.close()
            raise

    def _start_actors(self, spec: EngineSpec, open_engine: EngineOpener) -> list[Any]:
        block = spec.runtime.samplers
        if not ray_client.could_hold(self.ray, block):
            needs = ray_client.describe_resources(block)
            raise UserError(f"runtime.executor.samplers: no node of the Ray cluster has what each asks for ({needs}).")
        settings = {
            "model_dir": str(spec.model_dir.resolve()),
            "runtime": local_runtime(spec.runtime).model_dump(mode="json"),
            "precision": spec.precision,
            "max_length": spec.max_length,
            "seed": spec.seed,
        }
        actor_class = self.ray.remote(Shard).options(
            num_cpus=block.cpus,
            num_gpus=block.gpus,
            resources=dict(block.resources),
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
        )
        return [actor_class.remote(settings, open_engine) for _ in range(block.count)]

    def _await_first(self, seconds: float) -> tuple[str, str, list[str]]:
        """Return ``Shard.about`` of the first engine that is open. The others may come later."""
        references = [actor.about.remote() for actor in self.actors]
        ready, _ = self.ray.wait(references, num_returns=1, timeout=seconds)
        if not ready:
            raise RuntimeError(f"no engine opened on the Ray cluster within {seconds:.0f} s (runtime.engine.timeout)")
        about: tuple[str, str, list[str]] = self.ray.get(ready[0])
        return about

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """Return sampled responses, as the protocol has it."""

        def start(actor: Any, first: int, last: int) -> Any:
            shard = shard_sampling(sampling, first, last - first)
            return actor.generate.remote(prompts[first:last], shard, self.version, self.weights)

        def report(prompts_done: int) -> None:
            if on_progress is not None:
                on_progress(prompts_done * sampling.n, len(prompts) * sampling.n)

        rows = self._run_shares(len(prompts), start, report)
        return [[Response(**fields) for fields in row] for row in rows]

    def sample(self, requests: list[TurnRequest], temperature: float, top_p: float) -> list[Response]:
        """Return the responses to ``requests``, whose keys differ; each has its own seed and limit."""

        def start(actor: Any, first: int, last: int) -> Any:
            return actor.sample.remote(requests[first:last], temperature, top_p, self.version, self.weights)

        return [Response(**fields) for fields in self._run_shares(len(requests), start, lambda requests_done: None)]

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """Return log-probabilities of response tokens, as the protocol has it."""

        def start(actor: Any, first: int, last: int) -> Any:
            return actor.score.remote(
                prompts[first:last], responses[first:last], temperature, self.version, self.weights
            )

        return self._run_shares(len(prompts), start, lambda prompts_done: None)

    def _run_shares(
        self, count: int, start: Callable[[Any, int, int], Any], report: Callable[[int], None]
    ) -> list[Any]:
        """Run shares of ``count`` prompts on whichever engine is free, and return the results in order.

        ``start(actor, first, last)`` starts one share; ``report`` gets the number of prompts that are done.
        """
        # Several shares per engine, so a fast engine gets more of them.
        size = max(1, -(-count // (SHARES * len(self.actors))))
        waiting = [(first, min(first + size, count)) for first in range(0, count, size)]
        results: dict[int, list[Any]] = {}
        in_flight: dict[Any, tuple[Any, tuple[int, int]]] = {}
        idle = list(self.actors)
        losses = 0
        while waiting or in_flight:
            # 1. Give every idle engine a share.
            while waiting and idle:
                actor = idle.pop(0)
                share = waiting.pop(0)
                in_flight[start(actor, *share)] = (actor, share)
            # 2. Take the first result.
            (reference, *_), _ = self.ray.wait(list(in_flight), num_returns=1)
            actor, share = in_flight.pop(reference)
            try:
                results[share[0]] = self.ray.get(reference)
            except self.ray.exceptions.RayActorError as error:
                # 3. The engine died: its share goes to the head of the queue. Ray restarts the actor meanwhile.
                losses += 1
                if losses > RETRIES * len(self.actors):
                    raise RuntimeError(f"engines on the Ray cluster died {losses} times: {error}") from None
                waiting.insert(0, share)
                time.sleep(1.0)
            else:
                report(sum(map(len, results.values())))
            idle.append(actor)
        return [result for first in sorted(results) for result in results[first]]

    def load_weights(self, weights: Weights) -> None:
        """Put weights, in the checkpoint's shapes, into Ray once: all of them, or an adapter whose base is there.

        Each engine reads them before its next call.
        """
        self.version += 1
        if not isinstance(weights, AdaptedWeights):
            self.weights = [self._put(weights)]
            return
        if self.base is None or self.base[0] != weights.key:
            self.base = (weights.key, [self.version, self._put(weights.base())])
        self.weights = [self._put(weights.adapter.items()), *self.base[1]]

    def _put(self, weights: Weights) -> Any:
        """Return Ray's reference to a copy of the tensors, in their shapes."""
        return self.ray.put([(name, tensor.detach().cpu().contiguous()) for name, tensor in weights])

    def close(self) -> None:
        """End the engines and the connection."""
        self.connection.__exit__(None, None, None)


def local_runtime(runtime: Runtime) -> Runtime:
    """Return the runtime of one engine, which samples in its own process."""
    threads = runtime.threads or max(1, int(runtime.samplers.cpus))
    return runtime.model_copy(update={"executor": LocalExecutor(), "threads": threads})
