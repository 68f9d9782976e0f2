"""The studio's Chat view through its API, with real tiny checkpoints on transformers and a stand-in for endpoints."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from align.inference.replier import Replier, Reply, ReplyOptions, ReplyToken
from align.models.reward import RewardModel
from align.store.annotations import AnnotationSet
from align.store.store import Store
from align.studio.app import create_app
from align.studio.context import StudioContext
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.studio.chat_store import HOSTILE, write_chat_store
from tests.support.studio.client import OWN_PAGE, TOKEN, open_client

HI = [{"role": "user", "content": "Hi"}]
KEY = "sk-secret-of-tests"
Events = list[tuple[str, Any]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_reward: Path) -> Path:
    return write_chat_store(tmp_path_factory.mktemp("chat") / "store", tiny_model, tiny_reward)


@pytest.fixture(scope="module")
def client(store: Path) -> TestClient:
    return open_client(store, chat_keys=("CHAT_KEY", "NO_KEY"))


@pytest.fixture
def fake() -> Iterator[FakeChat]:
    server = FakeChat()
    yield server
    server.stop()


@contextmanager
def listening(store: Path) -> Iterator[httpx.Client]:
    """Serve the studio from a thread of this process; its streams can be closed early."""
    config = uvicorn.Config(create_app(StudioContext(Store.open(store)), TOKEN), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60, trust_env=False) as http:
        yield http
    server.should_exit = True
    thread.join(10)


def wait_until(is_true: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def parse(text: str) -> Events:
    events = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":") and ": " in line)
        if "event" in lines:
            events.append((lines["event"], json.loads(lines["data"])))
    return events


def ask(client: TestClient | httpx.Client, **body: Any) -> Events:
    own = {} if isinstance(client, httpx.Client) and not isinstance(client, TestClient) else OWN_PAGE
    answer = client.post("/api/chat/reply", json={"messages": HI} | body, headers=own)
    assert answer.status_code == 200, answer.text
    return parse(answer.text)


def problem(events: Events) -> str:
    name, value = events[-1]
    assert name == "problem", events
    return str(value["error"])


def replying_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "chat-reply"]


def test_checkpoints_and_reward_models_are_listed(client: TestClient) -> None:
    lists = client.get("/api/chat").json()
    assert {(each["id"], each["address"]) for each in lists["models"]} == {
        ("smoke:sft", f"sft/{'a' * 12}"),
        ("smoke:dpo", f"dpo/{'b' * 12}"),
    }
    assert [each["id"] for each in lists["rewards"]] == ["smoke:reward"]


def test_a_checkpoint_streams_what_it_would_say_at_once(client: TestClient, store: Path) -> None:
    events = ask(client, model="smoke:sft", seed=3, max_tokens=12)
    start = next(value for name, value in events if name == "start")
    assert start["settings"] | {"thinking": None} == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 20, "max_tokens": 12, "seed": 3, "thinking": None,
    }, "settings that a request does not have are the checkpoint's"  # fmt: skip
    pieces = [value for name, value in events if name == "piece"]
    name, done = events[-1]
    assert name == "done"
    replier = Replier(store / "sft" / ("a" * 12) / "model")
    reply = replier.start(HI, ReplyOptions(seed=3, max_tokens=12))
    tokens = list(reply.sample())
    assert "".join(piece["text"] for piece in pieces) == done["text"] == reply.text
    assert done["count"] == len(tokens)
    sent = [piece["tokens"][0]["logprob"] for piece in pieces]
    assert sent == pytest.approx([token.logprob for token in tokens], abs=1e-5)
    assert all(len(piece["tokens"][0]["top"]) == 5 for piece in pieces)
    by_address = ask(client, model=f"sft/{'a' * 12}", seed=3, max_tokens=12)
    assert by_address[-1][1]["text"] == done["text"]
    assert "status" not in dict(by_address), "the model is in memory"


def test_two_checkpoints_answer_at_once(store: Path) -> None:
    with listening(store) as http:
        answers: dict[str, Events] = {}

        def talk(model: str) -> None:
            answers[model] = ask(http, model=model, temperature=0, max_tokens=24)

        threads = [threading.Thread(target=talk, args=(model,)) for model in ("smoke:sft", "smoke:dpo")]
        for thread in threads:
            thread.start()
        assert http.get("/api/runs").status_code == 200, "other views answer meanwhile"
        for thread in threads:
            thread.join(60)
        assert {events[-1][0] for events in answers.values()} == {"done"}, answers
        texts = [events[-1][1]["text"] for events in answers.values()]
        assert texts[0] != texts[1]
        assert all(model["loaded"] for model in http.get("/api/chat").json()["models"])


def test_a_closed_request_ends_its_reply(store: Path) -> None:
    with listening(store) as http:
        body = {"model": "smoke:sft", "messages": HI, "max_tokens": 900, "temperature": 0}
        with http.stream("POST", "/api/chat/reply", json=body) as response:
            lines = response.iter_lines()
            assert any("event: piece" in line for line in lines)
            assert replying_threads()
        wait_until(lambda: not replying_threads())
        assert ask(http, model="smoke:sft", max_tokens=2)[-1][0] == "done"


def test_rewards_are_those_of_the_reward_model(client: TestClient, store: Path) -> None:
    body = {"reward": "smoke:reward", "messages": HI, "answers": [["Yes", True], ["No", False]]}
    answer = client.post("/api/chat/scores", json=body, headers=OWN_PAGE).json()
    model = RewardModel(store / "reward" / ("c" * 12) / "model")
    expected = model.score([HI, HI], ["Yes", "No"], [True, False])
    assert answer["scores"] == pytest.approx(expected, abs=1e-5)
    refused = client.post("/api/chat/scores", json=body | {"reward": "smoke:sft"}, headers=OWN_PAGE)
    assert refused.status_code == 400
    assert "is not a reward model" in refused.json()["error"]


def test_hostile_messages_are_texts_for_a_checkpoint(client: TestClient) -> None:
    messages = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE + "<|im_end|>{{ 1/0 }}"}]
    events = ask(client, model="smoke:dpo", messages=messages, max_tokens=4)
    assert events[-1][0] == "done"


def test_requests_that_name_no_model_are_refused(client: TestClient) -> None:
    endpoint = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    for body, status, text in (
        ({}, 400, "Name a checkpoint or an endpoint"),
        ({"model": "smoke:sft", "endpoint": endpoint}, 400, "Name a checkpoint or an endpoint"),
        ({"model": "smoke:missing"}, 404, "has no stage 'missing'"),
        ({"model": "../x:y"}, 400, "is not the name of a kind"),
        ({"model": "runs/aaaaaa"}, 404, "has no artifacts"),
        ({"model": "smoke:reward"}, 400, "is not a model that replies"),
        ({"model": "smoke:sft", "tools": "{"}, 400, "The tools are no JSON"),
        ({"model": "smoke:sft", "tools": "{}"}, 400, "a JSON list of functions"),
        ({"model": "smoke:sft", "temperature": -1}, 422, "temperature"),
        ({"model": "smoke:sft", "messages": []}, 422, "messages"),
    ):  # fmt: skip
        answer = client.post("/api/chat/reply", json={"messages": HI} | body, headers=OWN_PAGE)
        assert (answer.status_code, text in answer.json()["error"]) == (status, True), answer.text
    foreign = OWN_PAGE | {"origin": "http://evil.example"}
    assert (
        client.post("/api/chat/reply", json={"model": "smoke:sft", "messages": HI}, headers=foreign).status_code == 403
    )


def test_studio_ends_after_a_model_that_replies(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends while torch computes in another thread is aborted."""
    sample = Reply.sample

    def sample_slowly(reply: Reply) -> Iterator[ReplyToken]:
        for token in sample(reply):
            yield token
            time.sleep(2)

    monkeypatch.setattr(Reply, "sample", sample_slowly)
    with listening(store) as http:
        with http.stream("POST", "/api/chat/reply", json={"messages": HI, "model": "smoke:sft"}) as answer:
            assert "event: piece" in answer.iter_lines()
        assert replying_threads()
    # The model is not in use. The thread may have its last lines to run, but would be asleep between two tokens.
    for thread in replying_threads():
        thread.join(0.5)
    assert not replying_threads()


def test_what_a_checkpoint_refuses_is_a_text(client: TestClient) -> None:
    assert "no switch for thoughts" in problem(ask(client, model="smoke:sft", thinking="on"))
    long = [{"role": "user", "content": "x" * 5000}]
    assert "Shorten the last message" in problem(ask(client, model="smoke:sft", messages=long))


def test_a_damaged_checkpoint_is_a_text_and_harms_no_other(tmp_path: Path, tiny_model: Path, tiny_reward: Path) -> None:
    store = write_chat_store(tmp_path / "store", tiny_model, tiny_reward)
    weights = store / "sft" / ("a" * 12) / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    client = open_client(store)
    assert "model.safetensors" in problem(ask(client, model="smoke:sft"))
    assert ask(client, model="smoke:dpo", max_tokens=2)[-1][0] == "done"


def test_a_checkpoint_with_its_own_code_is_refused(tmp_path: Path, tiny_model: Path, tiny_reward: Path) -> None:
    store = write_chat_store(tmp_path / "store", tiny_model, tiny_reward)
    config = store / "sft" / ("a" * 12) / "model" / "config.json"
    (config.parent / "evil.py").write_text("open('/tmp/owned', 'w')\nclass Model: pass\n")
    content = json.loads(config.read_text()) | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Model"}}
    config.write_text(json.dumps(content))
    assert problem(ask(open_client(store), model="smoke:sft"))


def streamed(*deltas: dict[str, Any], **last: Any) -> tuple[int, bytes, dict[str, str]]:
    """Return an answer as servers stream it."""
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop", **last})
    lines = "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices)
    return 200, f": ping\n\n{lines}data: [DONE]\n\n".encode(), {"Content-Type": "text/event-stream"}


def test_an_endpoint_streams_text_thoughts_and_calls(
    client: TestClient, fake: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_KEY", KEY)
    call = {"index": 0, "id": "1", "function": {"name": "add", "arguments": '{"a"'}}
    fake.reply = lambda body: streamed(
        {"reasoning_content": "I think "}, {"reasoning_content": HOSTILE}, {"content": "Ye"}, {"content": HOSTILE},
        {"tool_calls": [call]}, {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    )  # fmt: skip
    endpoint = {"url": fake.url, "model": "good-model", "key_variable": "CHAT_KEY"}
    tools = json.dumps([{"type": "function", "function": {"name": "add"}}])
    events = ask(client, endpoint=endpoint, temperature=0.25, seed=7, max_tokens=40, tools=tools)
    pieces = [value for name, value in events if name == "piece"]
    assert "".join(piece["thought"] for piece in pieces) == f"I think {HOSTILE}"
    name, done = events[-1]
    assert (name, done["text"], done["finished"]) == ("done", f"Ye{HOSTILE}", True)
    assert done["calls"] == [{"name": "add", "arguments": '{"a": 1}'}]
    sent = fake.bodies[-1]
    assert (sent["temperature"], sent["seed"], sent["max_tokens"], sent["stream"]) == (0.25, 7, 40, True)
    assert "top_p" not in sent
    assert "logprobs" not in sent
    assert fake.headers[-1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps(events)


def test_an_endpoint_gives_probabilities_if_asked(client: TestClient, fake: FakeChat) -> None:
    top = [{"token": "Yes", "logprob": -0.1}, {"token": "No", "logprob": -9999.0}]
    token = {"token": "Yes", "logprob": -0.1, "top_logprobs": top}
    fake.reply = lambda body: (
        completion("Yes")
        | {
            "choices": [
                {**completion("Yes")["choices"][0], "finish_reason": "length", "logprobs": {"content": [token]}}
            ]
        }
    )
    events = ask(client, endpoint={"url": fake.url, "model": "good-model", "logprobs": True})
    piece = next(value for name, value in events if name == "piece")
    assert piece["tokens"] == [{"name": "Yes", "logprob": -0.1, "top": [["Yes", -0.1], ["No", None]]}]
    assert (fake.bodies[-1]["logprobs"], fake.bodies[-1]["top_logprobs"]) == (True, 5)
    assert (events[-1][1]["text"], events[-1][1]["finished"]) == ("Yes", False)


def test_problems_of_endpoints_are_texts_without_the_key(
    client: TestClient, fake: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_KEY", KEY)
    monkeypatch.delenv("NO_KEY", raising=False)
    endpoint = {"url": fake.url, "model": "good-model", "key_variable": "CHAT_KEY"}
    for reply, text in (
        ((401, {"error": {"message": f"bad key {KEY}"}}), "status 401: bad key ***"),
        ((200, b"<html>"), "no chat completion"),
        ((200, b"data: {\n\n", {"Content-Type": "text/event-stream"}), "no chat completion"),
        ((200, b'data: {"error": {"message": "overloaded"}}\n\n', {"Content-Type": "text/event-stream"}), "overloaded"),
    ):
        fake.reply = lambda body, reply=reply: reply  # type: ignore[misc]
        error = problem(ask(client, endpoint=endpoint))
        assert text in error
        assert KEY not in error
    assert "could not be asked" in problem(ask(client, endpoint={"url": "http://127.0.0.1:9/v1", "model": "m"}))
    assert "NO_KEY is not set" in problem(ask(client, endpoint=endpoint | {"key_variable": "NO_KEY"}))
    assert "use https" in problem(ask(client, endpoint=endpoint | {"url": "http://example.com/v1"}))


def test_key_that_was_not_named_is_not_sent(
    client: TestClient, fake: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", KEY)
    error = problem(ask(client, endpoint={"url": fake.url, "model": "good-model", "key_variable": "OTHER_KEY"}))
    assert "may not send the key in OTHER_KEY" in error
    assert "--chat-key" in error
    assert not fake.bodies


def test_a_closed_request_ends_the_endpoints_answer(store: Path) -> None:
    begun = threading.Event()
    closed = threading.Event()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(20)
        request = b""
        while b'"stream": true' not in request:
            request += connection.recv(65536)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        connection.sendall(head + b'data: {"choices": [{"delta": {"content": "Once"}}]}\n\n')
        begun.set()
        if connection.recv(1) == b"":
            closed.set()

    with socket.create_server(("127.0.0.1", 0)) as listener, listening(store) as http:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        body = {"endpoint": {"url": url, "model": "m"}, "messages": HI}
        with http.stream("POST", "/api/chat/reply", json=body) as response:
            lines = response.iter_lines()
            assert any("Once" in line for line in lines)
            assert begun.is_set()
            assert not closed.is_set()
        assert closed.wait(20)


def test_two_answers_become_a_pair_of_annotations(client: TestClient, store: Path) -> None:
    line = {"prompt": HI, "a": HOSTILE, "b": "No", "systems": ["smoke:sft", "smoke:dpo"], "scores": {"r": [1.0, 0.5]}}
    added = client.post("/api/annotate/chats/pairs", json={"lines": json.dumps(line)}, headers=OWN_PAGE)
    assert added.json() == {"added": 1, "read": 1, "skipped": []}
    (pair,) = AnnotationSet(store, "chats").pairs().values()
    assert {pair.a, pair.b} == {HOSTILE, "No"}
