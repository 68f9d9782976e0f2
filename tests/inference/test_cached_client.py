"""Requests through caches and budgets: what is counted, what is copied, and where the money ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from align.config.endpoint import EndpointConfig
from align.errors import UserError
from align.inference import endpoint_client
from align.inference.cached_client import AnswerSink, Budget, CachedClient, Prices, bounds
from align.inference.endpoint_client import Endpoint, EndpointLost
from align.inference.requests import Answer, Request, RequestCache
from tests.support.inference.fake_chat import FakeChat, completion


class Counter:
    """Answers with how often it was asked, ten tokens in and two out; ``fails`` are the samples it cannot answer."""

    def __init__(self, *fails: int, group: int = 1) -> None:
        self.identity = {"checkpoint": "counter"}
        self.asked: list[int] = []
        self.fails, self.group = fails, group

    def answer(self, requests: list[Request], sink: AnswerSink) -> None:
        for start in range(0, len(requests), self.group):
            some = requests[start : start + self.group]
            self.asked += [entry.sample for entry in some]
            sink.record([(entry, self._answer(entry)) for entry in some])

    def _answer(self, request: Request) -> Answer:
        if request.sample in self.fails:
            return Answer("", error="it is too long")
        return Answer(str(len(self.asked)), prompt_tokens=10, completion_tokens=2)


def _requests(count: int) -> list[Request]:
    request = Request({"checkpoint": "counter"}, [{"role": "user", "content": "Hi"}], max_tokens=8)
    return [replace(request, sample=sample) for sample in range(count)]


def test_usage_counts_each_answer_once_and_failures_apart(tmp_path: Path) -> None:
    client, backend = CachedClient(RequestCache(tmp_path)), Counter(2)
    requests = _requests(4)
    answers = client.ask(backend, [*requests, requests[0]])
    assert [answer.error for answer in answers] == ["", "", "it is too long", "", ""]
    client.ask(backend, requests[:2])
    actual = client.usage_json()["model"]
    assert actual == {
        "requests": 3, "prompt_tokens": 30, "completion_tokens": 6, "copied": 0, "copied_prompt_tokens": 0,
        "copied_completion_tokens": 0, "uncounted": 0, "failed": 1,
    }  # fmt: skip
    assert backend.asked == [0, 1, 2, 3]
    client.ask(backend, requests)
    assert backend.asked == [0, 1, 2, 3, 2], "what failed is not kept, and so asked again"
    assert client.usage_json()["model"] == actual


def test_shared_cache_is_read_and_filled(tmp_path: Path) -> None:
    requests = _requests(5)
    CachedClient(RequestCache(tmp_path / "one"), RequestCache(tmp_path / "shared")).ask(Counter(), requests[:2])
    backend = Counter()
    client = CachedClient(RequestCache(tmp_path / "two"), RequestCache(tmp_path / "shared"))
    answers = client.ask(backend, requests)
    assert backend.asked == [2, 3, 4]
    usage = client.usage_json()
    assert (usage["model"]["requests"], usage["model"]["copied"], usage["model"]["copied_prompt_tokens"]) == (3, 2, 20)
    # the stage is killed and goes on: the shared cache knows everything by now, which must not change what is counted
    again = CachedClient(RequestCache(tmp_path / "two"), RequestCache(tmp_path / "shared"))
    assert again.ask(Counter(), requests) == answers
    assert again.usage_json() == usage and again.new == 0


def test_a_model_that_had_no_request_is_in_the_usage_with_zeros(tmp_path: Path) -> None:
    client = CachedClient(RequestCache(tmp_path))
    assert client.ask(Counter(), [], "judge") == []
    assert client.usage_json()["judge"]["requests"] == 0


def test_a_backend_that_leaves_one_out_is_caught(tmp_path: Path) -> None:
    backend = Counter()
    backend.answer = lambda requests, sink: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="left a request without an answer"):
        CachedClient(RequestCache(tmp_path)).ask(backend, _requests(1))


def test_progress_counts_up_to_what_is_expected(tmp_path: Path) -> None:
    calls: list[tuple[int, int, int]] = []
    client = CachedClient(RequestCache(tmp_path), on_progress=lambda *now: calls.append(now), expected=6)
    client.ask(Counter(group=2), _requests(4))
    client.ask(Counter(), _requests(8)[4:])
    assert calls == [(2, 6, 0), (4, 6, 0), (4, 6, 8), (5, 8, 8), (6, 8, 8), (7, 8, 8), (8, 8, 8), (8, 8, 16)]


def test_bounds_and_prices_by_hand() -> None:
    request = Request({}, [{"role": "user", "content": "äb"}], max_tokens=100)
    # 3 bytes and 16 for the turn, 64 for the template
    assert bounds(request) == (83, 100)
    with_tools = Request({}, [{"role": "assistant", "content": "", "tool_calls": "[12]"}], 100, tools="[{}]")
    # 16 for the turn, 64 for the template, and twice the 4 bytes of the call and of the schemas
    assert bounds(with_tools) == (96, 100)
    prices = Prices(input=2.0, output=10.0)
    assert prices.bound(request) == pytest.approx((83 * 2 + 100 * 10) / 1e6)
    assert prices.cost(request, Answer("", prompt_tokens=5, completion_tokens=7)) == pytest.approx((5 * 2 + 70) / 1e6)
    assert prices.cost(request, Answer("")) == prices.bound(request), "what is not counted is taken at its bound"


def test_a_budget_waits_for_what_is_under_way_before_it_gives_up() -> None:
    budget = Budget(1.0)

    async def spend(bound: float, real: float) -> None:
        async with budget.reserve(bound):
            await asyncio.sleep(0.05)
            budget.spent += real

    async def both() -> None:
        await asyncio.gather(spend(0.8, 0.1), spend(0.8, 0.1))

    asyncio.run(both())
    assert budget.spent == pytest.approx(0.2) and budget.reserved == 0
    with pytest.raises(UserError, match=r"max_cost 1 is reached: 0.2 spent, and the next request may cost 0.9"):
        asyncio.run(spend(0.9, 0))


@pytest.fixture
def fake() -> Iterator[FakeChat]:
    server = FakeChat(lambda body: completion("one two", usage={"prompt_tokens": 10, "completion_tokens": 2}))
    yield server
    server.stop()


def _paid(fake: FakeChat, folder: Path, max_cost: float, **settings: object) -> tuple[CachedClient, Endpoint]:
    config = EndpointConfig(url=fake.url, model="m", concurrency=4, price_input=1e6, price_output=1e6, **settings)
    return CachedClient(RequestCache(folder), max_cost=max_cost, prices={"model": Prices(1e6, 1e6)}), Endpoint(config)


def _paid_requests(endpoint: Endpoint) -> list[Request]:
    return [replace(request, model=endpoint.identity) for request in _requests(20)]


def test_max_cost_is_never_exceeded_and_raising_it_goes_on(fake: FakeChat, tmp_path: Path) -> None:
    # bounded by 2 + 16 + 64 + 8 = 90, a request takes 12: after 18 answers 216 are spent, and 90 more are too many
    client, endpoint = _paid(fake, tmp_path, 300)
    with pytest.raises(UserError, match=r"max_cost 300 is reached: 216 spent, and the next request may cost 90"):
        client.ask(endpoint, _paid_requests(endpoint))
    assert len(fake.bodies) == 18 == len(RequestCache(tmp_path))
    client, endpoint = _paid(fake, tmp_path, 300)
    with pytest.raises(UserError, match="216 spent"):
        client.ask(endpoint, _paid_requests(endpoint))
    client, endpoint = _paid(fake, tmp_path, 320)
    client.ask(endpoint, _paid_requests(endpoint))
    assert len(fake.bodies) == 20
    assert client.usage_json()["model"]["cost"] == 240


def test_surplus_of_answers_is_reserved(fake: FakeChat, tmp_path: Path) -> None:
    """A thinking model is billed for 108 tokens although ``max_tokens`` is 8, so an answer costs 118."""
    fake.reply = lambda body: completion("one two", usage={"prompt_tokens": 10, "completion_tokens": 108})
    # After two answers 236 are spent. The bound of 90 fits into 350, and with the surplus of 100 it does not.
    message = r"236 spent, and the next request may cost 190 \(100 of it because answers were billed"
    for _ in range(2):  # the second client learns the surplus from the cache
        client, endpoint = _paid(fake, tmp_path, 350)
        with pytest.raises(UserError, match=message):
            client.ask(endpoint, _paid_requests(endpoint))
        assert client.budget.spent == 236 and client.budget.reserved == 0
    assert len(fake.bodies) == 2


def test_attempts_that_timed_out_are_paid_at_their_bound(
    fake: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.01)
    fake.reply = fake.hang
    client, endpoint = _paid(fake, tmp_path, 300, timeout=0.1, retries=1)
    with pytest.raises(EndpointLost):
        client.ask(endpoint, _paid_requests(endpoint))
    assert client.budget.spent == 180
    client, endpoint = _paid(fake, tmp_path, 200, timeout=0.1, retries=1)
    with pytest.raises(UserError, match="180 spent"):
        client.ask(endpoint, _paid_requests(endpoint))


def test_one_endpoint_under_two_names_is_paid_once(fake: FakeChat, tmp_path: Path) -> None:
    client, endpoint = _paid(fake, tmp_path, 1000)
    client.prices["judge"] = client.prices["model"]
    client.ask(endpoint, _paid_requests(endpoint)[:3])
    again, endpoint = _paid(fake, tmp_path, 1000)
    again.prices["judge"] = again.prices["model"]
    again.ask(endpoint, _paid_requests(endpoint)[:2])
    again.ask(endpoint, _paid_requests(endpoint)[2:3], "judge")
    assert again.budget.spent == 36
