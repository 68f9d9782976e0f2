"""A session at a pool of stand-ins for vLLM's server: turns are sent one by one, and a lost server's go to others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.inference.protocol import Sampling, Session, TurnRequest
from align.inference.servers.pool import PoolEngine
from align.inference.servers.server_client import BadReply, EngineLost, WeightsChanged
from align.inference.sessions import PoolSession, open_session
from align.inference.trainer_engine import ask_each
from align.inference.weights import checkpoint_weights
from tests.support.inference.fake_server import FakeServer, completion
from tests.support.inference.server_harness import PROMPTS, soon, wait_for

COMPLETIONS = "/v1/completions"
Opened = Callable[..., PoolEngine]


def turn(key: int, prompt: list[int] | None = None, max_tokens: int = 4) -> TurnRequest:
    return TurnRequest(key, prompt or PROMPTS[key], max_tokens, Sampling(4).request_seed(key, 0))


def expected(request: TurnRequest) -> list[int]:
    body = {"seed": request.seed, "max_tokens": request.max_tokens, "prompt": request.prompt}
    tokens: list[int] = completion(body)["choices"][0]["token_ids"]
    return tokens


def drained(session: Session) -> dict[int, list[int]]:
    responses: dict[int, list[int]] = {}
    while session.pending:
        responses |= {key: response.token_ids for key, response in session.poll()}
    return responses


def asked(fake: FakeServer) -> list[Any]:
    return [body for path, body in fake.calls if path == COMPLETIONS]


def test_turns_are_sent_while_others_are_under_way(fakes: list[FakeServer], opened: Opened) -> None:
    """A long turn holds up nobody: other episodes get their answers and send their next turns."""
    go, long = threading.Event(), turn(0)

    def answer(body: Any) -> Any:
        if body["prompt"] == long.prompt:
            go.wait(20)
        return completion(body)

    for fake in fakes:
        fake.answers[COMPLETIONS] = answer
    session = open_session(opened(), 0.5, 0.9)
    assert isinstance(session, PoolSession) and not session.is_lockstep
    session.submit(long)
    history = [1, 2]
    for _ in range(3):
        session.submit(turn(1, history))
        ((key, response),) = session.poll()
        assert (key, response.token_ids) == (1, expected(turn(1, history)))
        assert response.finished == (response.token_ids[-1] == 2)
        history = [*history, *response.token_ids, 7]
    assert session.pending == 1
    with soon():
        assert session.poll(timeout=0.3) == []
    go.set()
    assert drained(session) == {0: expected(long)}
    assert session.poll() == []  # nothing is under way
    body = asked(fakes[0])[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.9, 4)
    session.close()


def test_answers_are_those_of_generate(opened: Opened) -> None:
    pool = opened()
    whole = [row[0].token_ids for row in pool.generate(PROMPTS, Sampling(4))]
    session = open_session(pool, 1.0)
    for key in range(len(PROMPTS)):
        session.submit(turn(key))
    assert drained(session) == dict(enumerate(whole))
    session.close()


def test_no_server_has_more_under_way_than_it_decodes_at_once(fakes: list[FakeServer], opened: Opened) -> None:
    for fake in fakes:
        fake.answers[COMPLETIONS] = lambda body: (time.sleep(0.02), completion(body))[1]
    session = open_session(opened(batch_size=2), 1.0)
    for key in range(len(PROMPTS)):
        session.submit(turn(key))
    assert drained(session) == {key: expected(turn(key)) for key in range(len(PROMPTS))}
    assert [fake.most_under_way for fake in fakes] == [2, 2]
    session.close()


def test_an_episode_stays_with_its_server(fakes: list[FakeServer], opened: Opened) -> None:
    """It has the earlier turns in its cache; of one prompt's first turns it has the prompt."""
    session = open_session(opened(batch_size=64), 1.0)
    for number in range(4):
        for key in range(8):
            session.submit(turn(key, [1, key // 2, *range(number)]))
        drained(session)
    groups = [{body["prompt"][1] for body in asked(fake)} for fake in fakes]
    assert groups[0] | groups[1] == {0, 1, 2, 3} and not groups[0] & groups[1]
    assert [len(group) for group in groups] == [2, 2]
    session.close()


def test_a_lost_servers_turns_go_to_others(fakes: list[FakeServer], opened: Opened, warnings: list[str]) -> None:
    session = open_session(opened(restarts=0, timeout=1), 1.0)
    fakes[0].answers[COMPLETIONS] = fakes[0].hang
    with soon(20):
        for key in range(6):
            session.submit(turn(key))
        assert drained(session) == {key: expected(turn(key)) for key in range(6)}
        lost = asked(fakes[0])
        assert (
            lost and len(warnings) == 1 and "Server 1 of 2 is lost, for the first time: it is given up." in warnings[0]
        )
        # Later turns of its episodes go to the other one at once.
        for key in range(6):
            session.submit(turn(key, [*PROMPTS[key], 5]))
        assert drained(session) == {key: expected(turn(key, [*PROMPTS[key], 5])) for key in range(6)}
    assert asked(fakes[0]) == lost
    session.close()


def test_turns_wait_for_a_server_that_comes_back(fakes: list[FakeServer], opened: Opened) -> None:
    away = threading.Event()

    def gone(body: Any) -> Any:
        if not away.is_set():
            raise ConnectionError
        return completion(body)

    session = open_session(opened(timeout=10), 1.0)
    for fake in fakes:
        ready = fake.answers["/server_info"]
        fake.answers[COMPLETIONS] = gone
        fake.answers["/server_info"] = lambda body, ready=ready: ready(body) if away.is_set() else gone(body)
    threading.Timer(1.0, away.set).start()
    with soon(20):
        session.submit(turn(0))
        assert drained(session) == {0: expected(turn(0))}
    session.close()


def test_all_are_lost(fakes: list[FakeServer], opened: Opened) -> None:
    session = open_session(opened(restarts=0, timeout=1), 1.0)
    for fake in fakes:
        fake.answers[COMPLETIONS] = fake.drop
    session.submit(turn(0))
    with soon(20), pytest.raises(EngineLost, match="No server is left of 2"):
        drained(session)
    session.close()


def test_a_turn_that_nobody_answers(fakes: list[FakeServer], opened: Opened) -> None:
    session = open_session(opened(), 1.0)
    for fake in fakes:
        fake.answers[COMPLETIONS] = lambda body: (404, {"error": "too odd"})
    session.submit(turn(0))
    with soon(), pytest.raises(BadReply, match="too odd"):
        drained(session)
    session.close()


def test_closing_drops_what_is_under_way(fakes: list[FakeServer], opened: Opened, tiny_model: Path) -> None:
    pool = opened()
    session = open_session(pool, 1.0)
    for fake in fakes:
        fake.answers[COMPLETIONS] = fake.hang
    for key in range(12):
        session.submit(turn(key))
    # Nothing else may use the servers meanwhile.
    for call in (
        lambda: pool.generate(PROMPTS, Sampling(4)),
        lambda: ask_each(pool, print),
        lambda: pool.load_weights([]),
    ):
        with pytest.raises(RuntimeError, match="was called while 12 turns of a session are in flight"):
            call()
    with pytest.raises(RuntimeError, match="has an open session"):
        open_session(pool, 1.0)
    with soon():
        session.close()
        session.close()
    assert session.pending == 0 and session.poll(timeout=0.1) == []
    with pytest.raises(RuntimeError, match="this session is closed"):
        session.submit(turn(0))
    for fake in fakes:
        fake.answers[COMPLETIONS] = completion
    pool.load_weights(checkpoint_weights(tiny_model))
    assert [row[0].token_ids for row in pool.generate(PROMPTS[:2], Sampling(4))] == [
        expected(turn(0)),
        expected(turn(1)),
    ]


def test_turns_that_do_not_fit_are_refused(fakes: list[FakeServer], opened: Opened) -> None:
    session = open_session(opened(), 1.0)
    session.submit(turn(0))
    with pytest.raises(ValueError, match="episode 0 has a turn in flight"):
        session.submit(turn(0))
    with pytest.raises(ValueError, match="the engine takes 64 tokens, and a turn has 61 tokens of prompt and max_tok"):
        session.submit(turn(1, [1] * 61))
    session.submit(turn(1, [1] * 60))
    assert set(drained(session)) == {0, 1}
    session.close()


def test_the_share_of_cached_tokens_is_what_servers_tell(fakes: list[FakeServer], opened: Opened) -> None:
    session = open_session(opened(), 1.0)
    session.submit(turn(0))
    drained(session)
    assert session.cache_statistics() is None  # a server without the option does not tell
    for fake in fakes:
        fake.answers[COMPLETIONS] = lambda body: (
            completion(body)
            | {"usage": {"prompt_tokens_details": {"cached_tokens": 4 * (len(body["prompt"]) // 4) // 2}}}
        )
    for key, length in ((0, 8), (1, 12)):
        session.submit(turn(key, [1] * length))
    drained(session)
    assert session.cache_statistics() == {"prefix_hit_rate": (4 + 6) / (8 + 12)}
    session.close()


# ---- weights ----


def test_turns_under_other_weights_are_not_handed_out(fakes: list[FakeServer], opened: Opened) -> None:
    session = open_session(opened(), 1.0)
    session.submit(turn(0))
    drained(session)
    for fake in fakes:
        fake.holding["loads"] += 1
    session.submit(turn(0))
    with pytest.raises(WeightsChanged):
        drained(session)
    session.close()


def test_a_server_that_cannot_say_what_it_holds_is_lost_once(
    fakes: list[FakeServer], opened: Opened, warnings: list[str]
) -> None:
    """What it has under way goes to the other one."""
    go = threading.Event()
    session = open_session(opened(restarts=0, timeout=5), 1.0)

    def answer(body: Any) -> Any:
        if body["prompt"] != PROMPTS[0]:
            go.wait(20)
        return completion(body)

    fakes[0].answers |= {COMPLETIONS: answer, "/collective_rpc": fakes[0].drop}
    for key in range(6):
        session.submit(turn(key))
    with soon(20):
        wait_for(lambda: len(asked(fakes[0])) > 1)
        responses = drained(session)
    go.set()
    assert responses == {key: expected(turn(key)) for key in range(6)}
    assert len(warnings) == 1 and "Server 1 of 2 is lost" in warnings[0]
    session.close()
