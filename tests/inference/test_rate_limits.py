"""Requests and tokens per minute: kept in every minute, in order, over threads, and corrected by answers."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from align.config.endpoint import EndpointConfig
from align.config.scores import RewardEntry
from align.config.validation import validate
from align.data.rows import user
from align.inference import rate_limits
from align.inference.cached_client import CachedClient
from align.inference.endpoint_client import Endpoint
from align.inference.rate_limits import RateLimit, RequestLog, estimate_tokens
from align.inference.requests import Answer, Request, RequestCache
from tests.support.inference.fake_chat import FakeChat, completion

MODEL = {"url": "http://127.0.0.1:9/v1", "model": "m"}


class FakeClock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        with self.lock:
            self.now += seconds
        await asyncio.sleep(0)


def limit(clock: FakeClock, **limits: int) -> RateLimit:
    return RateLimit(EndpointConfig(**MODEL, **limits), RequestLog(clock, clock.sleep))


def request(tokens: int = 1, text: str = "") -> Request:
    return Request({"model": "m"}, [user(text)], max_tokens=tokens)


def send(rate_limit: RateLimit, clock: FakeClock, *tokens: int) -> list[float]:
    """Send requests one after another; the times at which they were sent."""

    async def run() -> list[float]:
        times = []
        for count in tokens:
            await rate_limit.acquire(request(count))
            times.append(clock.now - 1000.0)
        return times

    return asyncio.run(run())


def check_windows(times: list[float], weights: list[int], most: int) -> None:
    for start in times:
        inside = [weight for time, weight in zip(times, weights, strict=True) if start <= time < start + 60]
        assert sum(inside) <= most, (start, times)


def test_requests_per_minute_hold_in_every_minute() -> None:
    clock = FakeClock()
    # Three at once, then three when the first three leave the window, and so on.
    assert send(limit(clock, requests_per_minute=3), clock, *[1] * 7) == pytest.approx([0, 0, 0, 60, 60, 60, 120])


def test_tokens_per_minute_hold_in_every_minute() -> None:
    clock = FakeClock()
    # 60 and 30 fit into 100. The next 30 wait for the 60 to leave. A request over the limit waits for an empty minute.
    times = send(limit(clock, tokens_per_minute=100), clock, 60, 30, 30, 500, 10)
    assert times == pytest.approx([0, 0, 60, 120, 180])


def test_answer_corrects_the_estimate() -> None:
    clock = FakeClock()
    rate_limit = limit(clock, tokens_per_minute=100)

    async def run() -> None:
        sent = await rate_limit.acquire(request(80))
        rate_limit.correct(sent, Answer("x", prompt_tokens=5, completion_tokens=5))
        await rate_limit.acquire(request(80))
        assert clock.now == 1000.0
        # A server that does not count leaves the estimate.
        rate_limit.correct(await rate_limit.acquire(request(10)), Answer("x"))
        await rate_limit.acquire(request(10))
        assert clock.now == 1060.0

    asyncio.run(run())


def test_large_request_is_not_overtaken() -> None:
    clock = FakeClock()
    rate_limit = limit(clock, tokens_per_minute=100)
    order: list[int] = []

    async def one(tokens: int) -> None:
        await rate_limit.acquire(request(tokens))
        order.append(tokens)

    async def run() -> None:
        await rate_limit.acquire(request(50))
        await asyncio.gather(one(90), one(1), one(2))

    asyncio.run(run())
    assert order == [90, 1, 2]


def test_cancelled_request_leaves_the_queue() -> None:
    clock = FakeClock()
    rate_limit = limit(clock, requests_per_minute=1)

    async def run() -> None:
        await rate_limit.acquire(request())
        waiting = asyncio.create_task(rate_limit.acquire(request()))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.wait_for(rate_limit.acquire(request()), 30)

    asyncio.run(run())


def test_threads_share_the_counts() -> None:
    clock = FakeClock()
    log = RequestLog(clock, clock.sleep)
    config = EndpointConfig(**MODEL, requests_per_minute=5)
    times: list[float] = []

    def work() -> None:
        async def run() -> None:
            for _ in range(5):
                sent = await RateLimit(config, log).acquire(request())
                assert sent is not None
                times.append(sent.time)

        asyncio.run(run())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(times) == 20
    check_windows(sorted(times), [1] * 20, 5)
    assert max(times) >= 1000 + 3 * 60


def test_endpoints_of_one_model_and_key_share_a_log() -> None:
    def log(**fields: Any) -> RequestLog:
        return RateLimit(EndpointConfig(**(MODEL | {"requests_per_minute": 1} | fields))).log

    assert log() is log(tokens_per_minute=7)
    assert log() is not log(model="other")
    assert log() is not log(key_variable="KEY")


def test_estimate_has_prompt_and_answer() -> None:
    assert estimate_tokens(request(100, "x" * 40)) == 110


def test_endpoint_waits_for_its_limit(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    log = RequestLog(clock, clock.sleep)
    monkeypatch.setattr(rate_limits, "_shared_log", lambda config: log)
    refused = [True]

    def reply(body: dict[str, Any]) -> Any:
        return (503, {}, {"Retry-After": "0"}) if refused and refused.pop() else completion("yes")

    fake = FakeChat(reply)
    endpoint = Endpoint(EndpointConfig(url=fake.url, model="m", requests_per_minute=2, retries=1))
    client = CachedClient(RequestCache(tmp_path))
    requests = [Request(endpoint.identity, [user(str(number))], max_tokens=5) for number in range(3)]
    assert [answer.text for answer in client.ask(endpoint, requests)] == ["yes"] * 3
    fake.stop()
    # Four requests with the retry: two a minute.
    assert len(fake.bodies) == 4
    assert 60 <= clock.now - 1000 < 120


def test_limits_are_not_part_of_keys() -> None:
    limits = {"requests_per_minute": 3, "tokens_per_minute": 1000}
    for fields in ({}, {"criteria": "rubric"}):
        identities = []
        for extra in ({}, limits):
            entry = fields | {"judge": {"endpoint": MODEL | extra}}
            identities.append(validate(RewardEntry, entry, "p.yaml: score[0]").identity("score[0]"))
        assert identities[0] == identities[1]
