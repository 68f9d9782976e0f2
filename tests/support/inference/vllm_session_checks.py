"""Checks of a session at a live vLLM engine, which ``vllm_checks.py`` opens."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from align.inference.protocol import Sampling, TurnRequest
from align.inference.sessions import VllmSession, open_session
from align.inference.thoughts import ThoughtReader, generate
from align.inference.vllm import VllmEngine
from align.inference.vllm_internals import Steps, VllmChanged
from align.inference.weights import checkpoint_weights

SAMPLING = Sampling(24, temperature=0.9, seed=11)


def raised(kind: type[Exception], action: Any) -> str:
    """The message of the error that ``action`` ends with."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def opened(engine: VllmEngine) -> VllmSession:
    session = open_session(engine, SAMPLING.temperature)
    assert isinstance(session, VllmSession) and not session.is_lockstep
    return session


def request(prompts: list[list[int]], key: int, max_tokens: int = 24) -> TurnRequest:
    return TurnRequest(key, prompts[key], max_tokens, SAMPLING.request_seed(key, 0))


def drained(session: VllmSession) -> dict[int, Any]:
    responses: dict[int, Any] = {}
    while session.pending:
        responses.update(session.poll())
    return responses


def turns_join_while_others_decode(engine: VllmEngine, prompts: list[list[int]]) -> None:
    """Each comes two steps after the one before, and is what ``generate`` samples with its seed."""
    expected = [row[0] for row in engine.generate(prompts, SAMPLING)]
    random_state = torch.get_rng_state()
    session, responses = opened(engine), {}
    for key in range(len(prompts)):
        session.submit(request(prompts, key))
        for _ in range(2):
            responses.update(session.poll(timeout=0))
    assert session.pending > 1  # others were decoding when the last one came
    responses |= drained(session)
    session.close()
    assert torch.equal(torch.get_rng_state(), random_state)  # the trainer's
    for key, response in enumerate(expected):
        assert responses[key].token_ids == response.token_ids, key
        assert np.allclose(responses[key].logprobs, response.logprobs, atol=1e-4)
        assert (responses[key].finished, responses[key].text) == (response.finished, response.text)


def turns_have_their_own_limits(engine: VllmEngine, prompts: list[list[int]]) -> None:
    session, expected = opened(engine), engine.generate(prompts, SAMPLING)
    for key in range(len(prompts)):
        session.submit(request(prompts, key, 1 + 3 * key))
    order = []
    while session.pending:
        order += [(key, response.token_ids) for key, response in session.poll()]
    session.close()
    for key, tokens in order:
        assert tokens == expected[key][0].token_ids[: 1 + 3 * key]
    cut = [key for key, tokens in order if len(tokens) == 1 + 3 * key]
    assert len(cut) > 1 and cut == sorted(cut)  # the short ones do not wait for the long ones


def next_turns_find_their_beginning_cached(engine: VllmEngine) -> None:
    prompt = [1, *((11 * index) % 250 + 3 for index in range(63))]
    engine.load_weights(checkpoint_weights(Path(engine.llm.model_config.model)))  # empties the cache
    session = opened(engine)
    assert session.cache_statistics() is None
    session.submit(TurnRequest(4, prompt, 8, 1))
    (first,) = drained(session).values()
    assert session.cache_statistics() == {"prefix_hit_rate": 0.0}
    second = [*prompt, *first.token_ids, 30, 31, 32]
    session.submit(TurnRequest(4, second, 8, 2))
    (response,) = drained(session).values()
    rate = (session.cache_statistics() or {})["prefix_hit_rate"]
    assert rate == 64 / (64 + len(second)), rate  # two blocks of 32, or four of 16
    # Read from the cache or not, the states are those of the model.
    assert engine.llm.reset_prefix_cache()
    session.submit(TurnRequest(4, second, 8, 2))
    (again,) = drained(session).values()
    session.close()
    assert again.token_ids == response.token_ids
    assert np.allclose(again.logprobs, response.logprobs, atol=1e-4)


def closing_aborts_what_is_in_flight(engine: VllmEngine, prompts: list[list[int]]) -> None:
    before = [row[0].token_ids for row in engine.generate(prompts, SAMPLING)]
    session = opened(engine)
    for key in range(len(prompts)):
        session.submit(request(prompts, key, 60))
    assert session.poll(timeout=0) == []
    # Nothing else may use the engine meanwhile.
    assert "8 turns of a session are in flight" in raised(RuntimeError, lambda: engine.generate(prompts, SAMPLING))
    assert "'load_weights'" in raised(RuntimeError, lambda: engine.load_weights(iter(())))
    assert "has an open session" in raised(RuntimeError, lambda: opened(engine))
    assert "episode 3 has a turn in flight" in raised(ValueError, lambda: session.submit(request(prompts, 3)))
    session.close()
    assert session.pending == 0 and session.poll() == []
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert not session.steps.scheduler.has_requests()
    assert "closed" in raised(RuntimeError, lambda: session.submit(request(prompts, 0)))
    session.close()
    # Weights are taken, which needs every block, and the next call samples as if nothing had been.
    engine.load_weights(checkpoint_weights(Path(engine.llm.model_config.model)))
    assert [row[0].token_ids for row in engine.generate(prompts, SAMPLING)] == before


def a_poll_ends_in_time(engine: VllmEngine, prompts: list[list[int]]) -> None:
    session = opened(engine)
    began = time.monotonic()
    assert session.poll() == []  # nothing is in flight: nothing to wait for
    core = engine.llm.llm_engine.engine_core.engine_core
    step = core.step_fn
    core.step_fn = lambda: (time.sleep(0.05), step())[1]
    session.submit(request(prompts, 0, 100))
    assert session.poll(timeout=0.2) == []
    core.step_fn = step
    assert 0.2 <= time.monotonic() - began < 5
    session.close()


def refused_turns_leave_the_others(engine: VllmEngine, prompts: list[list[int]]) -> None:
    session = opened(engine)
    session.submit(request(prompts, 0))
    for prompt, limit in (([], 4), ([1], 0), ([1] * 500, 4)):
        raised(ValueError, lambda prompt=prompt, limit=limit: session.submit(TurnRequest(1, prompt, limit, 0)))
    assert session.pending == 1
    assert list(drained(session)) == [0]
    session.close()


def changed_insides_fail_loudly(engine: VllmEngine) -> None:
    def llm(**engine_parts: Any) -> Any:
        return SimpleNamespace(enqueue=print, llm_engine=SimpleNamespace(**engine_parts))

    calls = {"step": print, "abort_request": print}
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=object(), batch_queue=None))
    scheduler = SimpleNamespace(has_requests=print)
    without_queue = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    for broken, part in (
        (object(), "enqueue"),
        (llm(), "step"),
        (llm(step=print), "abort_request"),
        (llm(**calls), "scheduler"),
        (llm(**calls, engine_core=core), "scheduler"),
        (llm(**calls, engine_core=without_queue), "scheduler"),
    ):
        assert f"vLLM's {part} is not where" in raised(VllmChanged, lambda broken=broken: Steps(broken, print, 9))
    # A request under another name than it was added with would be waited for without end.
    session = opened(engine)
    session.submit(TurnRequest(0, [1, 30], 1, 0))
    real = session.steps.abort
    session._keys = {"renamed": 0}
    assert "name of a request" in raised(VllmChanged, session.poll)
    session.steps.abort = lambda names: real([])  # type: ignore[method-assign]
    session.close()
    session.steps.abort = real  # type: ignore[method-assign]


def thoughts_are_closed_by_force(engine: VllmEngine) -> None:
    """A random model never closes the thought that its prompt opens."""
    tokenizer = engine.tokenizer
    prompts = [tokenizer(f"{name}<think>\n", add_special_tokens=False)["input_ids"] for name in ("a", "bcd", "e")]
    closing = tokenizer("\n</think>\n\n", add_special_tokens=False)["input_ids"]
    sampling = Sampling(24, temperature=0.9, n=2, seed=3, thinking_budget=6)
    reader = ThoughtReader(tokenizer)
    rows = generate(engine, reader, prompts, sampling)
    free = engine.generate(prompts, sampling)
    for row, free_row in zip(rows, free, strict=True):
        for limited, unlimited in zip(row, free_row, strict=True):
            assert limited.token_ids[:6] == unlimited.token_ids[:6]
            assert limited.token_ids[6:17] == closing and limited.forced == list(range(6, 17))
            assert limited.mask == [True] * 6 + [False] * 11 + [True] * (len(limited.token_ids) - 17)
            assert limited.thought_tokens >= 17 and not limited.is_open
            assert limited.logprobs[6:17] == [0.0] * 11 and len(limited.token_ids) <= 24
    assert [[response.token_ids for response in row] for row in rows] == [
        [response.token_ids for response in row] for row in generate(engine, reader, prompts, sampling)
    ]


def check_sessions(engine: VllmEngine, prompts: list[list[int]]) -> None:
    """Run every check of this file."""
    turns_join_while_others_decode(engine, prompts)
    turns_have_their_own_limits(engine, prompts)
    thoughts_are_closed_by_force(engine)
    next_turns_find_their_beginning_cached(engine)
    closing_aborts_what_is_in_flight(engine, prompts)
    a_poll_ends_in_time(engine, prompts)
    refused_turns_leave_the_others(engine, prompts)
    changed_insides_fail_loudly(engine)
