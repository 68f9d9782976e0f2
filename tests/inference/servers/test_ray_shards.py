"""Shares of prompts: their responses' seeds are those of the whole, and an engine that dies costs a repetition only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.inference.protocol import Sampling
from align.inference.servers import ray_shards
from align.inference.servers.ray_shards import RayEngine, Shard, shard_sampling
from align.inference.weights import AdaptedWeights, HeldBase


@given(st.integers(0, 2**40), st.integers(1, 30), st.integers(0, 29), st.booleans())
def test_a_part_has_the_seeds_of_the_whole(seed: int, count: int, first: int, has_seeds: bool) -> None:
    first = min(first, count - 1)
    full = Sampling(8, n=2, seed=seed, seeds=tuple(range(seed, seed + count)) if has_seeds else None)
    part = shard_sampling(full, first, count - first)
    for place in range(first, count):
        for sample in range(2):
            assert part.request_seed(place - first, sample) == full.request_seed(place, sample)
    assert (part.max_tokens, part.temperature, part.n) == (8, 1.0, 2)


class Dead(Exception):
    pass


class Ray:
    """Answers at once; the actor ``dies`` loses its first ``losses`` shares."""

    class exceptions:
        RayActorError = Dead

    def __init__(self, losses: int) -> None:
        self.losses = losses

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        actor, result = reference
        if actor == "dies" and self.losses:
            self.losses -= 1
            raise Dead("gone")
        return list(result)


def engine(losses: int) -> RayEngine:
    ray_engine = object.__new__(RayEngine)
    ray_engine.ray, ray_engine.actors = Ray(losses), ["lives", "dies"]
    return ray_engine


def test_shares_keep_their_order_if_an_engine_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_shards.time, "sleep", lambda _: None)
    messages: list[int] = []
    for count in (1, 2, 7, 50):
        messages.clear()
        shares = engine(3)._run_shares(count, lambda actor, first, last: (actor, range(first, last)), messages.append)
        assert shares == list(range(count))
        assert messages == sorted(messages) and messages[-1] == count
    assert engine(0)._run_shares(0, lambda *_: None, messages.append) == []
    with pytest.raises(RuntimeError, match="engines on the Ray cluster died 7 times"):
        engine(99)._run_shares(50, lambda actor, first, last: (actor, range(first, last)), messages.append)


def test_only_the_adapter_is_put_for_later_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    put: list[list[str]] = []
    loaded: list[dict[str, torch.Tensor]] = []
    held = HeldBase()

    def load(weights: Any) -> None:
        with held.loading(weights) as needed:
            loaded.append(dict(needed))

    ray = SimpleNamespace(put=lambda tensors: put.append([name for name, _ in tensors]) or tensors, get=list)
    monkeypatch.setattr(ray_shards.ray_client, "require_ray", lambda: ray)
    trainer, shard = object.__new__(RayEngine), object.__new__(Shard)
    trainer.ray, trainer.version, trainer.base = ray, 0, None
    shard.engine, shard.version = SimpleNamespace(load_weights=load), 0  # type: ignore[assignment]
    base = {"layers.0.q.weight": torch.ones(2), "norm.weight": torch.ones(2)}
    for value in (2.0, 3.0):
        adapter = {"layers.0.q.weight": torch.full((2,), value)}
        trainer.load_weights(AdaptedWeights("policy", lambda: iter(base.items()), adapter))
        for _ in range(2):  # the second call has nothing to read
            shard._take_weights(trainer.version, trainer.weights)
    trainer.load_weights(list(base.items()))
    shard._take_weights(trainer.version, trainer.weights)
    # The base is put once, before the first adapter; whole weights are put whole.
    assert put == [list(base), ["layers.0.q.weight"], ["layers.0.q.weight"], list(base)]
    assert [list(tensors) for tensors in loaded] == [list(base), ["layers.0.q.weight"], list(base)]
    assert [float(tensors["layers.0.q.weight"][0]) for tensors in loaded] == [2.0, 3.0, 1.0]
