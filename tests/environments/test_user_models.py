"""The models that play the user: requests, failures, cache, cost, and the resources of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.config.environment import SimulatedUserConfig
from align.config.runtime import Runtime
from align.config.runtime.rollouts import RolloutsConfig
from align.data.rows import user
from align.environments.simulated_user import UserAnswer, UserRequest
from align.environments.user_models import EndpointUser, UserResources, open_stage_user
from align.errors import UserError
from align.inference import endpoint_client
from align.inference.endpoint_client import EndpointLost
from align.pipeline.context import StageContext
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.rl.stages import make_stage

SYSTEM = {"role": "system", "content": "You want a lamp."}
Open = Callable[..., EndpointUser]


@pytest.fixture
def server() -> Iterator[FakeChat]:
    fake = FakeChat(lambda body: completion("A lamp."))
    yield fake
    fake.stop()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.01)


@pytest.fixture
def open_user(server: FakeChat, tmp_path: Path) -> Open:
    """Opens a user at the server as another process would, with the same folder."""

    def open_(
        endpoint: dict[str, Any] | None = None,
        folder: str = "user",
        outage_fails_episodes: bool = True,
        **fields: Any,
    ) -> EndpointUser:
        block = {"url": server.url, "model": "good-model", "retries": 1, "patience": 0, "concurrency": 2} | (
            endpoint or {}
        )
        config = SimulatedUserConfig(endpoint=block, **{"prompt": "You.", "max_tokens": 9} | fields)  # type: ignore[arg-type]
        resources = UserResources(
            Runtime(), "float32", tmp_path / folder, None, pytest.fail, outage_fails_episodes=outage_fails_episodes
        )
        return EndpointUser(config, resources, "ppo.environment.user")

    return open_


def asked(episode: int, seed: int = 7) -> UserRequest:
    return UserRequest(episode, 1, [SYSTEM, user("Hi!")], seed)


def test_it_is_asked_with_the_episodes_seed_and_once(server: FakeChat, open_user: Open) -> None:
    speaker = open_user(temperature=0.5)
    requests = [asked(0, 7), asked(1, 8), asked(2, 7)]
    assert speaker.answer(requests) == [UserAnswer("A lamp.")] * 3
    # Equal seeds and conversations are one request.
    assert len(server.bodies) == 2 and server.bodies[0]["seed"] != server.bodies[1]["seed"]
    for body in server.bodies:
        assert body["messages"] == [SYSTEM, user("Hi!")]
        assert (body["max_tokens"], body["temperature"], body["model"]) == (9, 0.5, "good-model")
    # A process that was killed before it wrote its journal finds the answers again.
    assert open_user(temperature=0.5).answer(requests) == [UserAnswer("A lamp.")] * 3
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        (completion(""), "the user's answer is empty."),
        (completion("A la", finish_reason="length"), "the user's answer was cut off at its max_tokens"),
        (completion("", refusal="no"), "the user's server declined to answer."),
        (completion("x", finish_reason="content_filter"), "the user's server declined to answer."),
        ((400, {"error": {"message": "too long"}}), "the user's server refuses the request with status 400: too long."),
        (b"no JSON", "the user's server gave an answer that is no chat completion"),
        ((503, "busy"), "answered with status 503: \"busy\"; gave up after 2 attempts (ppo.environment.user.endp"),
    ],
)  # fmt: skip
def test_what_fails_an_episode_fails_no_other(server: FakeChat, open_user: Open, reply: Any, failure: str) -> None:
    server.reply = lambda body: reply if body["seed"] == broken else completion("A lamp.")
    speaker = open_user()
    broken = -1
    assert speaker.answer([asked(0, 1)]) == [UserAnswer("A lamp.")]
    broken = seed_of(server, asked(1, 2), open_user)
    good, bad = speaker.answer([asked(0, 1), asked(1, 2)])
    assert good == UserAnswer("A lamp.") and failure in bad.failure and not bad.text
    assert "run again" not in bad.failure
    # The next turn is asked for as if nothing had happened.
    broken = -1
    assert speaker.answer([asked(1, 3)]) == [UserAnswer("A lamp.")]


def seed_of(server: FakeChat, request: UserRequest, open_user: Open) -> int:
    """Return the seed that a request is sent with."""
    open_user(folder="elsewhere").answer([request])
    seed: int = server.bodies[-1]["seed"]
    return seed


def test_lost_server_fails_unanswered_requests(server: FakeChat, open_user: Open) -> None:
    speaker = open_user({"concurrency": 1})
    assert speaker.answer([asked(0, 1)]) == [UserAnswer("A lamp.")]
    server.stop()
    answers = speaker.answer([asked(0, 1), asked(1, 2), asked(2, 3)])
    assert answers[0] == UserAnswer("A lamp.")
    for answer in answers[1:]:
        assert "could not be asked" in answer.failure and "gave up after 2 attempts" in answer.failure


@pytest.mark.parametrize("concurrency", [1, 2])
def test_unanswered_request_fails_only_its_episode(server: FakeChat, open_user: Open, concurrency: int) -> None:
    """With ``concurrency`` 1 or 2 most of the batch is not sent yet when the first request runs out of attempts."""
    speaker = open_user({"concurrency": concurrency})
    requests = [asked(episode, 10 + episode) for episode in range(8)]
    lost = {seed_of(server, requests[episode], open_user) for episode in (0, 5)}
    speaker.answer([asked(0, 1)])
    server.bodies.clear()
    server.reply = lambda body: (503, "busy") if body["seed"] in lost else completion("A lamp.")
    answers = speaker.answer(requests)
    for episode, answer in enumerate(answers):
        if episode in (0, 5):
            assert "gave up after 2 attempts" in answer.failure
        else:
            assert answer == UserAnswer("A lamp.")
    # Two attempts of the two, and one of each of the others.
    assert len(server.bodies) == 2 * 2 + 6


def test_lost_server_gets_no_request_of_every_episode(server: FakeChat, open_user: Open) -> None:
    speaker = open_user({"concurrency": 1})
    speaker.answer([asked(0, 1)])
    server.bodies.clear()
    server.reply = lambda body: (503, "busy")
    answers = speaker.answer([asked(episode, 10 + episode) for episode in range(8)])
    assert all("gave up after 2 attempts" in answer.failure for answer in answers)
    assert len(server.bodies) == 2 * 2  # two requests


def test_lost_server_ends_stage_that_stores_episodes(server: FakeChat, open_user: Open) -> None:
    speaker = open_user({"concurrency": 1}, outage_fails_episodes=False)
    lost = seed_of(server, asked(1, 2), open_user)
    server.reply = lambda body: (503, "busy") if body["seed"] == lost else completion("A lamp.")
    requests = [asked(0, 1), asked(1, 2), asked(2, 3)]
    with pytest.raises(EndpointLost, match="gave up after 2 attempts"):
        speaker.answer(requests)
    # The next attempt asks for what is missing.
    server.reply = lambda body: completion("A lamp.")
    server.bodies.clear()
    assert open_user(outage_fails_episodes=False).answer(requests) == [UserAnswer("A lamp.")] * 3
    assert len(server.bodies) == 2


def test_wrong_endpoint_is_an_error_before_start(
    server: FakeChat, open_user: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_user().check()
    assert server.prompts() == ["Reply with the one word: ready"]
    # A server that answered an earlier attempt of the stage is asked again.
    server.reply = lambda body: (400, {"error": {"message": "no such model"}})
    with pytest.raises(UserError, match=r"user\.endpoint: the server refuses the request with status 400: no such"):
        open_user().check()
    server.reply = lambda body: completion("ready")
    with pytest.raises(UserError, match=r"user\.endpoint\.url: http://127\.0\.0\.1:9/v1 could not be asked"):
        open_user({"url": "http://127.0.0.1:9/v1"}, folder="other").check()
    with pytest.raises(
        UserError, match=r"^ppo\.environment\.user\.endpoint\.key_variable: the environment variable NO"
    ):
        open_user({"key_variable": "NO_SUCH_KEY"})
    monkeypatch.setenv("A_KEY", "wrong")
    server.reply = lambda body: (401, {"error": {"message": "who are you?"}})
    with pytest.raises(UserError, match="refuses the key in A_KEY: status 401: who are you?"):
        open_user({"key_variable": "A_KEY"}, folder="third").check()
    server.reply = lambda body: (400, {"error": {"message": "no such field"}})
    with pytest.raises(UserError, match=r"user\.endpoint: the server refuses the request with status 400"):
        open_user(folder="fourth").check()


def test_costs_are_counted_over_attempts_and_stop_at_the_budget(server: FakeChat, open_user: Open) -> None:
    endpoint = {"price_input": 1000.0, "price_output": 10000.0}
    speaker = open_user(endpoint, max_cost=1000.0)
    speaker.answer([asked(0, 1), asked(1, 2)])
    usage = open_user(endpoint, max_cost=1000.0).usage()
    # 10 tokens of a prompt at 1000 a million, and two words of an answer at 10000 a million.
    assert usage["requests"] == 2 and usage["cost"] == pytest.approx(2 * (0.01 + 0.02))
    assert usage["prompt_tokens"] == 20 and usage["completion_tokens"] == 4
    with pytest.raises(UserError, match=r"max_cost 0\.07 is reached: 0\.06 spent"):
        open_user(endpoint, max_cost=0.07).answer([asked(2, 3)])


@pytest.fixture
def context(server: FakeChat, tmp_path: Path) -> StageContext:
    """A stage whose user is a server."""
    environment: dict[str, Any] = {
        "class": "tests.support.environments.buttons:Buttons",
        "max_tokens": 80,
        "user": {"prompt": "ab", "endpoint": {"url": server.url, "model": "good-model"}},
    }
    return make_stage("grpo", tmp_path, tmp_path, environment=environment, score=None, max_tokens=80)


@pytest.mark.parametrize(("servers", "processes"), [(0, 4), (2, 1)])
def test_the_budget_is_shared_by_the_processes_that_play(
    context: StageContext, monkeypatch: pytest.MonkeyPatch, servers: int, processes: int
) -> None:
    """With a pool of servers the first process plays all episodes."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    runtime = context.runtime.model_copy(update={"rollouts": RolloutsConfig(servers=servers)})
    user = open_stage_user(replace(context, runtime=runtime))
    assert isinstance(user, EndpointUser) and user._client.processes == processes
