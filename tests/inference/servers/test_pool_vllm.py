"""Two real vLLM servers on a CPU, shared by these tests: they answer as one does, and either may be killed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from align.config.runtime import EngineConfig
from align.config.runtime.rollouts import RolloutsConfig
from align.inference.protocol import Sampling, TurnRequest
from align.inference.servers.pool import PoolEngine
from align.inference.servers.server import Member
from align.inference.servers.server_options import ServerSpec
from align.inference.sessions import open_session
from align.inference.trainer_engine import ask_each, probe, returns, trainer_logprobs
from align.inference.transformers import TransformersEngine
from align.models.loading import load_policy
from align.models.tuning.peft_layers import merged_weights
from tests.support.processes import descendants, is_alive

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

PROMPTS = [[1, 30 + i, 31, 32 + i] + [40 + i] * (3 * i) for i in range(8)]


@pytest.fixture(scope="module")
def warnings() -> list[str]:
    """What the pool warned of."""
    return []


@pytest.fixture(scope="module")
def pool(tiny_model: Path, warnings: list[str]) -> Iterator[PoolEngine]:
    served = ServerSpec.of(
        tiny_model,
        device=torch.device("cpu"),
        dtype=torch.float32,
        config=EngineConfig(cpu_kv_cache_gb=0.1, timeout=500),
        pool=RolloutsConfig(servers=2),
        max_length=128,
        seed=7,
    )
    engine = PoolEngine(served, warnings.append)
    yield engine
    group = [child for member in engine.members for child in children(member)]
    engine.close()
    assert not [process for process in group if is_alive(process)]


def children(member: Member) -> list[psutil.Process]:
    assert member.client.server is not None
    return descendants(member.client.server.process.pid)


def kill_api(member: Member) -> None:
    leader = member.client.server.process.pid  # type: ignore[union-attr]
    next(child for child in children(member) if child.ppid() == leader).kill()


def trained(folder: Path, size: float) -> Any:
    model = load_policy(folder)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        weight = model.get_parameter(name)
        weight.data += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    return model


def tokens(draws: Any) -> list[list[list[int]]]:
    return [[entry.token_ids for entry in some] for some in draws]


def expected(model: Any, folder: Path, sampling: Sampling) -> list[list[list[int]]]:
    """What one vLLM server would say is not at hand here; greedily transformers says the same."""
    engine = TransformersEngine(folder, device=torch.device("cpu"), dtype=torch.float32, batch_size=8)
    engine.load_weights(merged_weights(model))
    return tokens(engine.generate(PROMPTS, sampling))


def test_two_servers_say_what_each_says(pool: PoolEngine) -> None:
    sampling = Sampling(16, n=2, seed=3)
    together = tokens(pool.generate(PROMPTS, sampling))
    assert ask_each(pool, lambda engine: tokens(engine.generate(PROMPTS, sampling))) == [together, together]


def test_session_samples_as_a_round_with_cached_first_turns(pool: PoolEngine) -> None:
    prompts = [[1, 100 + index, *range(30, 64)] for index in range(8)]  # a block of 32, and four tokens
    sampling = Sampling(16, seed=3)
    session = open_session(pool, 1.0)

    def sample(turns: list[list[int]]) -> list[list[int]]:
        for key, prompt in enumerate(turns):
            session.submit(TurnRequest(key, prompt, 16, sampling.request_seed(key, 0)))
        responses: dict[int, list[int]] = {}
        while session.pending:
            responses |= {key: response.token_ids for key, response in session.poll()}
        return [responses[key] for key in range(len(turns))]

    first = sample(prompts)
    assert session.cache_statistics() == {"prefix_hit_rate": 0.0}
    second = [[*prompt, *response, 7] for prompt, response in zip(prompts, first, strict=True)]
    sample(second)
    total = sum(map(len, [*prompts, *second]))
    assert session.cache_statistics() == {"prefix_hit_rate": 8 * 32 / total}  # each at the server that had the first
    session.close()
    assert first == [row[0].token_ids for row in pool.generate(prompts, sampling)]


def test_turns_go_on_with_new_weights_and_none_of_the_old_cache(pool: PoolEngine) -> None:
    """Each turn has the probabilities of the weights that it names, whatever computed the turns before it."""
    models = [trained(pool.spec.model_dir, size) for size in (0.05, 0.15)]
    version = pool.write_weights(merged_weights(models[0]))
    pool.offer(version, 0)
    pool.adopt(version)
    session = open_session(pool, 1.0)
    histories = [[1, 100 + index, *range(30, 64)] for index in range(8)]  # a block of 32, and four tokens
    for key, history in enumerate(histories):
        session.submit(TurnRequest(key, list(history), 16, Sampling(16).request_seed(key, 0)))
    updates: list[list[int | None]] = [[] for _ in histories]
    version = pool.write_weights(merged_weights(models[1]))
    while session.pending:
        for key, response in session.poll():
            updates[key].append(response.weights_update)
            model = models[response.weights_update or 0]
            logprobs = trainer_logprobs(model, [histories[key]], [response.token_ids], 1.0)
            assert (logprobs - torch.tensor(response.logprobs)).abs().max() < 1e-3
            histories[key] += [*response.token_ids, 7]
            if len(updates[key]) < 3:
                request = TurnRequest(key, list(histories[key]), 16, Sampling(16).request_seed(key, len(updates[key])))
                session.submit(request)
        if sum(map(len, updates)) >= 4:
            pool.offer(version, 1)
    session.close()
    pool.adopt(version)
    assert all(turns[-1] == 1 and turns == sorted(turns) for turns in updates), updates  # type: ignore[type-var]
    assert any(turns[0] == 0 for turns in updates)


def test_both_hold_new_weights(pool: PoolEngine) -> None:
    model = trained(pool.spec.model_dir, 0.1)
    pool.load_weights(merged_weights(model))
    gaps = ask_each(pool, lambda engine: probe(engine, model, PROMPTS).mean_gap)
    assert len(gaps) == 2 and max(gaps) < 1e-4


def test_one_is_killed_while_it_takes_weights(
    pool: PoolEngine, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other goes on alone; the new one holds the same weights before it answers."""
    model, sampling = trained(pool.spec.model_dir, 0.2), Sampling(24, temperature=0.0)
    victim, before = pool.members[0], returns(pool)
    read = victim.engine.read_weights

    def killed(version: int) -> None:
        kill_api(victim)
        read(version)

    monkeypatch.setattr(victim.engine, "read_weights", killed)
    pool.load_weights(merged_weights(model))
    assert "is lost, for the first time: it is restarted." in warnings[-1]
    assert not victim.ready
    wanted = expected(model, pool.spec.model_dir, sampling)
    assert tokens(pool.generate(PROMPTS, sampling)) == wanted
    while not victim.ready:  # as long as it takes; the test has a time limit
        assert victim.coming_back, victim.last_error
        pool.closing.wait(0.25)
    assert returns(pool) == before + 1
    gaps = ask_each(pool, lambda engine: probe(engine, model, PROMPTS).mean_gap)
    assert len(gaps) == 2 and max(gaps) < 1e-4
    assert ask_each(pool, lambda engine: tokens(engine.generate(PROMPTS, sampling))) == [wanted, wanted]


def test_one_is_killed_while_it_answers(pool: PoolEngine, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(60, n=4, seed=11)
    undisturbed = tokens(pool.generate(PROMPTS, sampling))
    victim, before = pool.members[1], len(warnings)
    done: list[int] = []

    def kill(count: int, total: int) -> None:
        if not done:
            kill_api(victim)
        done.append(count)

    assert tokens(pool.generate(PROMPTS, sampling, kill)) == undisturbed
    assert len(warnings) == before + 1 and "Its process was ended by SIGKILL" in warnings[-1]
