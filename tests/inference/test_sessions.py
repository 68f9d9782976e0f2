"""Sessions of engines that sample in lockstep, and what all sessions refuse. vLLM's are in ``test_vllm.py``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.inference.protocol import Response, Sampling, Session, TurnRequest
from align.inference.servers.ray_shards import RayEngine, Shard
from align.inference.sessions import LockstepSession, open_session
from align.inference.trainer_engine import RemoteRankEngine
from align.inference.transformers import TransformersEngine

PROMPTS = [[1, 30, 31], [1, 40, 41, 42, 43, 44, 45], [1, 50], [1, 60, 61, 62], [1, 70], [1, 71, 72]]
SAMPLING = Sampling(24, temperature=0.8, seed=9)
REQUESTS = [TurnRequest(key, prompt, 24, SAMPLING.request_seed(key, 0)) for key, prompt in enumerate(PROMPTS)]


def _engine(model_dir: Path, batch_size: int = 64) -> TransformersEngine:
    return TransformersEngine(model_dir, device=torch.device("cpu"), dtype=torch.float32, batch_size=batch_size)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    """An engine whose responses often end early: a random model rarely says the real end token."""
    opened = _engine(tiny_model, batch_size=4)
    opened.eos = 100
    return opened


def _sampled(session: Session, requests: Iterable[TurnRequest]) -> list[tuple[int, Response]]:
    for request in requests:
        session.submit(request)
    return session.poll()


def test_a_turn_is_what_generate_samples_with_its_seed(engine: TransformersEngine) -> None:
    expected = [(key, row[0]) for key, row in enumerate(engine.generate(PROMPTS, SAMPLING))]
    session = open_session(engine, SAMPLING.temperature)
    assert session.is_lockstep
    assert _sampled(session, REQUESTS) == expected  # bit for bit
    assert (session.pending, session.poll(), session.cache_statistics()) == (0, [], None)


def test_the_order_in_which_turns_were_submitted_changes_no_bit(engine: TransformersEngine) -> None:
    session = open_session(engine, SAMPLING.temperature)
    expected = _sampled(session, REQUESTS)
    for requests in (reversed(REQUESTS), [*REQUESTS[3:], *REQUESTS[:3]]):
        assert _sampled(session, requests) == expected


def test_each_turn_has_its_own_limit(engine: TransformersEngine) -> None:
    limits = [1, 24, 3, 2, 9, 5]
    limited = [TurnRequest(r.key, r.prompt, limit, r.seed) for r, limit in zip(REQUESTS, limits, strict=True)]
    session = open_session(engine, SAMPLING.temperature)
    complete, cut = dict(_sampled(session, REQUESTS)), dict(_sampled(session, limited))
    for key, limit in enumerate(limits):
        assert cut[key].token_ids == complete[key].token_ids[:limit]
        assert cut[key].logprobs == pytest.approx(complete[key].logprobs[:limit], abs=1e-5)
        assert cut[key].finished == (cut[key].token_ids[-1] == engine.eos)


def test_a_turn_follows_from_its_prompt_and_seed_alone(engine: TransformersEngine) -> None:
    session = open_session(engine, SAMPLING.temperature)
    together = dict(_sampled(session, REQUESTS))
    for request in REQUESTS:
        ((_, alone),) = _sampled(session, [TurnRequest(7 + request.key, request.prompt, 24, request.seed)])
        assert alone.token_ids == together[request.key].token_ids
    ((_, another),) = _sampled(session, [TurnRequest(0, PROMPTS[0], 24, 1)])
    assert another.token_ids != together[0].token_ids


def test_temperature_and_nucleus_are_the_sessions(engine: TransformersEngine) -> None:
    greedy = _sampled(open_session(engine, 0.0), REQUESTS)
    assert greedy == [(key, row[0]) for key, row in enumerate(engine.generate(PROMPTS, Sampling(24, temperature=0)))]
    nucleus = _sampled(open_session(engine, 0.8, 0.5), REQUESTS)
    sampling = Sampling(24, temperature=0.8, top_p=0.5, seed=9)
    assert nucleus == [(key, row[0]) for key, row in enumerate(engine.generate(PROMPTS, sampling))]


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (TurnRequest(0, [1], 1, 0), "episode 0 has a turn in flight"),
        (TurnRequest(1, [], 1, 0), "episode 1: a turn needs a prompt"),
        (TurnRequest(1, [1], 0, 0), "room for a token, and has 1 tokens of prompt and max_tokens 0"),
    ],
)
def test_turns_that_cannot_be_sampled_are_refused(
    engine: TransformersEngine, request_of: TurnRequest, message: str
) -> None:
    session = open_session(engine, 1.0)
    session.submit(REQUESTS[0])
    with pytest.raises(ValueError, match=message):
        session.submit(request_of)
    assert session.pending == 1


def test_a_closed_session_drops_its_turns(engine: TransformersEngine) -> None:
    session = open_session(engine, 1.0)
    session.submit(REQUESTS[0])
    session.close()
    assert session.poll() == []
    with pytest.raises(RuntimeError, match="this session is closed"):
        session.submit(REQUESTS[0])


def test_engines_without_sessions() -> None:
    with pytest.raises(TypeError, match="SimpleNamespace has no sessions"):
        open_session(SimpleNamespace(), 1.0)  # type: ignore[arg-type]
    session = open_session(RemoteRankEngine(torch.float32), 1.0)
    assert (session.pending, session.cache_statistics()) == (0, None)
    session.submit(REQUESTS[0])
    with pytest.raises(RuntimeError, match="only the stage's first process"):
        session.poll()
    session.close()


def test_engines_on_ray_sample_shares_in_sessions_of_their_own(engine: TransformersEngine) -> None:
    """Without Ray: its references are the results, and the shares go to two engines in turn."""
    shard = object.__new__(Shard)
    shard.engine, shard.version = engine, 3
    calls: list[int] = []

    def sample(requests: list[TurnRequest], *inputs: Any) -> Any:
        calls.append(len(requests))
        return shard.sample(requests, *inputs)

    class Ray:
        class exceptions:
            RayActorError = ValueError

        get = staticmethod(lambda reference: reference[1])
        wait = staticmethod(lambda references, num_returns: (references[:1], references[1:]))

    ray_engine = object.__new__(RayEngine)
    ray_engine.ray, ray_engine.version, ray_engine.weights = Ray(), 3, [None]
    # A reference is a key of a dictionary, so it holds the results at its second place by a hashable wrapper.
    actor = SimpleNamespace(sample=SimpleNamespace(remote=lambda *inputs: (object(), _Rows(sample(*inputs)))))
    ray_engine.actors = [actor, actor]
    session = open_session(ray_engine, SAMPLING.temperature)
    assert isinstance(session, LockstepSession)
    responses = _sampled(session, REQUESTS)
    assert calls == [1] * 6  # four shares for each of two engines, of one turn at least
    assert [(key, response.token_ids) for key, response in responses] == [
        (key, row[0].token_ids) for key, row in enumerate(engine.generate(PROMPTS, SAMPLING))
    ]


class _Rows(list[Any]):
    """A list that may be part of a dictionary's key."""

    __hash__ = object.__hash__  # type: ignore[assignment]
