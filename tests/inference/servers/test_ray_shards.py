"""Shares of prompts: their responses' seeds are those of the whole, and an engine that dies costs a repetition only."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.inference.protocol import Sampling
from align.inference.servers import ray_shards
from align.inference.servers.ray_shards import RayEngine, shard_sampling


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
