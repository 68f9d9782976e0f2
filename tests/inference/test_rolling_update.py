"""New weights while turns are in flight: every turn has those of one version, and says which."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align.inference.protocol import Response, Sampling, TurnRequest
from align.inference.server_worker import LOAD
from align.inference.servers.pool import PoolEngine
from align.inference.servers.server_client import EngineLost, WeightsChanged
from align.inference.sessions import PoolSession, open_session
from align.inference.weights import checkpoint_weights
from tests.support.inference.fake_server import FakeServer, completion
from tests.support.inference.server_harness import PROMPTS, soon, wait_for

COMPLETIONS, RPC, RESET = "/v1/completions", "/collective_rpc", "/reset_prefix_cache"
Opened = Callable[..., PoolEngine]
Offer = Callable[[PoolEngine, int], int]


class VersionedServer(FakeServer):
    """A stand-in whose log-probabilities are the version of its weights, below 0. It has a cache of prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[int, threading.Event] = {}
        """Second token of a prompt → event that its answer waits for."""
        self.drops_turns = self.refuses_weights = False
        self.load_gate: threading.Event | None = None
        """Event that reading weights waits for."""
        self.versions_of_turns: list[set[int]] = []
        """Versions that it held from the beginning to the end of each turn."""
        self.in_flight_at_load: list[int] = []
        """Turns under way when it was told to read weights."""
        self.cache: dict[tuple[int, ...], int] = {}
        """Beginning of a prompt → version of the weights that computed its keys and values."""
        self.stale_hits = 0
        self.answers |= {COMPLETIONS: self.complete, RPC: self.note_load, RESET: self.reset}

    @property
    def version(self) -> int:
        """Number of the version that it was given last."""
        return int(self.holding["version"].partition(":")[2])

    def complete(self, body: dict[str, Any]) -> Any:
        """Answer after the gate, if there is one; a turn needs some time."""
        before, prompt = self.version, body["prompt"]
        gate = self.gates.get(prompt[1])
        if gate is not None:
            gate.wait(20)
        if self.drops_turns:
            raise ConnectionError
        time.sleep(0.002)
        for length in range(1, len(prompt) + 1):
            self.stale_hits += self.cache.setdefault(tuple(prompt[:length]), before) != before
        self.versions_of_turns.append({before, self.version})
        answer = completion(body)
        count = len(answer["choices"][0]["token_ids"])
        answer["choices"][0]["logprobs"]["token_logprobs"] = [-float(before)] * count
        return answer

    def note_load(self, body: dict[str, Any]) -> Any:
        """Answer a call of its worker."""
        if body["method"] == LOAD:
            self.in_flight_at_load.append(self.under_way)
            if self.refuses_weights:
                return 400, {"error": "no room"}
            if self.load_gate is not None:
                self.load_gate.wait(20)
        return self.rpc(body)

    def reset(self, body: Any) -> Any:
        """Drop the cache."""
        self.cache.clear()
        return {"success": True}

    def loads(self) -> int:
        """Return how often it was told to read weights since it forgot its calls."""
        return sum(path == RPC and body["method"] == LOAD for path, body in self.calls)


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    two: list[FakeServer] = [VersionedServer(), VersionedServer()]
    yield two
    for entry in two:
        entry.stop()


@pytest.fixture
def offer(tiny_model: Path) -> Offer:
    """Writes the weights of an update for a pool and offers them; returns their version."""

    def write_and_offer(pool: PoolEngine, update: int) -> int:
        version = pool.write_weights(checkpoint_weights(tiny_model))
        pool.offer(version, update)
        return version

    return write_and_offer


def turn(key: int, prompt: list[int] | None = None) -> TurnRequest:
    return TurnRequest(key, prompt or PROMPTS[key], 4, Sampling(4).request_seed(key, 0))


def version_of(response: Response) -> int:
    """Return the version of the weights that sampled a turn, as the server shows it."""
    (version,) = set(response.logprobs)
    return -int(version)


def next_turns(session: Any) -> dict[int, Response]:
    with soon(20):
        turns = dict(session.poll())
    assert turns
    return turns


def test_turn_in_flight_keeps_its_weights(fakes: list[VersionedServer], opened: Opened, offer: Offer) -> None:
    pool = opened(batch_size=1)
    old = offer(pool, 3)
    pool.adopt(old)
    gate = threading.Event()
    for fake in fakes:
        fake.gates[PROMPTS[0][1]] = gate
    session = open_session(pool, 1.0)
    session.submit(turn(0))
    wait_for(lambda: any(fake.under_way for fake in fakes))
    busy, idle = sorted(fakes, key=lambda fake: -fake.under_way)
    new = offer(pool, 4)
    session.submit(turn(1))
    session.submit(turn(2))
    for key in (1, 2):
        ((returned, response),) = next_turns(session).items()
        # The idle server did not wait for the other one; that one has no turn but its long one.
        assert (returned, version_of(response), response.weights_update) == (key, new, 4)
    assert (idle.version, busy.version) == (new, old) and len(busy.versions_of_turns) == 0
    assert session.poll(timeout=0.3) == []
    gate.set()
    response = next_turns(session)[0]
    assert (version_of(response), response.weights_update) == (old, 3)
    session.submit(turn(0, [*PROMPTS[0], 7]))
    response = next_turns(session)[0]
    assert (version_of(response), response.weights_update) == (new, 4)
    session.close()
    pool.adopt(new)
    assert [fake.version for fake in fakes] == [new, new]
    assert all(fake.in_flight_at_load == [0, 0, 0] for fake in fakes)  # the checkpoint's, and two more


def test_weights_offered_during_tools_sample_the_next_turn(
    fakes: list[VersionedServer], opened: Opened, offer: Offer
) -> None:
    pool = opened()
    session = open_session(pool, 1.0)
    session.submit(turn(0))
    assert next_turns(session)[0].weights_update is None  # nobody said which update the checkpoint's are
    new = offer(pool, 1)
    session.submit(turn(0, [*PROMPTS[0], 7]))
    response = next_turns(session)[0]
    assert (version_of(response), response.weights_update) == (new, 1)
    session.close()


def test_turn_has_one_version_and_cache_ends_with_it(
    fakes: list[VersionedServer], opened: Opened, offer: Offer
) -> None:
    """Episodes of several turns, while weights come in the middle of some."""
    pool = opened(batch_size=3)
    pool.adopt(offer(pool, 0))
    versions = {pool.version: 0}
    session = open_session(pool, 1.0)
    histories = {key: [1, 30 + key % 4] for key in range(12)}
    left = dict.fromkeys(histories, 6)
    for key, history in histories.items():
        session.submit(turn(key, list(history)))
    updates: list[int | None] = []
    with soon(60):
        while session.pending:
            for key, response in session.poll():
                assert versions[version_of(response)] == response.weights_update
                updates.append(response.weights_update)
                histories[key] += [*response.token_ids, 7]
                left[key] -= 1
                if left[key]:
                    session.submit(turn(key, list(histories[key])))
            if len(updates) >= 15 * len(versions):
                update = len(versions)
                versions[offer(pool, update)] = update
    session.close()
    assert len(updates) == 72 and set(updates) >= {0, 1, 2, 3}
    for fake in fakes:
        assert all(len(held) == 1 for held in fake.versions_of_turns)
        assert not any(fake.in_flight_at_load) and fake.stale_hits == 0


def test_servers_that_took_the_offer_read_nothing_again(
    fakes: list[VersionedServer], opened: Opened, offer: Offer
) -> None:
    pool = opened()
    session = open_session(pool, 1.0)
    older, newer = offer(pool, 1), offer(pool, 2)
    session.submit(turn(0))
    next_turns(session)
    session.close()
    pool.adopt(older)  # the trainer's queue has both; nothing goes back
    pool.adopt(newer)
    assert [fake.loads() for fake in fakes] == [1, 1] and [fake.version for fake in fakes] == [newer, newer]
    assert pool.version == newer
    assert pool.generate(PROMPTS[:2], Sampling(4))


def test_server_lost_during_an_update_returns_with_new_weights(
    fakes: list[VersionedServer], opened: Opened, offer: Offer, warnings: list[str]
) -> None:
    pool = opened(batch_size=1, timeout=5)
    gate = threading.Event()
    for fake in fakes:
        fake.gates[PROMPTS[0][1]] = gate
    session = open_session(pool, 1.0)
    session.submit(turn(0))
    wait_for(lambda: any(fake.under_way for fake in fakes))
    busy = max(fakes, key=lambda fake: fake.under_way)
    new = offer(pool, 1)
    session.submit(turn(1))
    assert version_of(next_turns(session)[1]) == new
    busy.drops_turns = True
    gate.set()
    response = next_turns(session)[0]
    assert (version_of(response), response.weights_update) == (new, 1)  # sampled again, by the other server
    wait_for(lambda: pool.returns == 1)
    assert busy.version == new and len(warnings) == 1
    session.close()


def test_a_server_that_cannot_read_the_weights_is_lost(
    fakes: list[VersionedServer], opened: Opened, offer: Offer, warnings: list[str]
) -> None:
    pool = opened(restarts=0)
    fakes[0].refuses_weights = True
    session = open_session(pool, 1.0)
    new = offer(pool, 1)
    for key in range(4):
        session.submit(turn(key))
    turns: dict[int, Response] = {}
    while session.pending:
        turns |= next_turns(session)
    assert {version_of(response) for response in turns.values()} == {new}
    session.close()
    assert len(warnings) == 1 and "no room" in warnings[0] and "Server 1 of 2 is lost" in warnings[0]


def test_a_load_that_failed_is_seen_by_the_session_first(
    fakes: list[VersionedServer], opened: Opened, offer: Offer, warnings: list[str]
) -> None:
    """What the server holds is compared with nothing before, and the server is lost once."""
    pool = opened(restarts=0)
    member = pool.members[0]
    fakes[0].refuses_weights = True
    session = open_session(pool, 1.0)
    offer(pool, 1)
    session.submit(turn(0))
    assert isinstance(session, PoolSession)
    wait_for(lambda: all(load.done() for load in session.rolling_update._loads.values()))
    fakes[0].holding["content"] = "half of the new ones"
    assert member.is_loading and member.ready
    pool.check_weights(sampled=True)
    session.close()
    assert not member.is_loading and not member.ready and member.losses == 1 and len(warnings) == 1


def test_where_no_server_can_read_the_weights_the_session_ends(
    fakes: list[VersionedServer], opened: Opened, offer: Offer
) -> None:
    pool = opened(restarts=0)
    for fake in fakes:
        fake.refuses_weights = True
    session = open_session(pool, 1.0)
    offer(pool, 1)
    session.submit(turn(0))
    with soon(20), pytest.raises(EngineLost, match="no room"):
        session.poll()
    session.close()


def test_weights_changed_by_others_end_the_session(fakes: list[VersionedServer], opened: Opened, offer: Offer) -> None:
    """What they hold is compared before it is replaced, tensors included."""
    pool = opened()
    session = open_session(pool, 1.0)
    for fake in fakes:
        fake.holding["content"] = "somebody's"
    offer(pool, 1)
    session.submit(turn(0))
    with soon(20), pytest.raises(WeightsChanged):
        while session.pending:
            session.poll()
    session.close()


def test_closing_waits_for_a_server_that_reads_weights(
    fakes: list[VersionedServer], opened: Opened, offer: Offer, warnings: list[str]
) -> None:
    pool, go = opened(), threading.Event()
    for fake in fakes:
        fake.load_gate = go
    session = open_session(pool, 1.0)
    new = offer(pool, 1)
    session.submit(turn(0))
    wait_for(lambda: any(fake.loads() for fake in fakes))
    threading.Timer(0.3, go.set).start()
    session.close()
    assert [fake.version for fake in fakes] == [new, new] and not warnings
    pool.adopt(new)
    assert pool.generate(PROMPTS[:2], Sampling(4))
