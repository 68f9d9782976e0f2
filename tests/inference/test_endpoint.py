"""The client of OpenAI-compatible servers: what is sent, what is tried again, what is said when it fails."""

from __future__ import annotations

import email.utils
import gzip
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import AddedToken

from align.config.endpoint import EndpointConfig
from align.errors import UserError
from align.inference import endpoint_client
from align.inference.cached_client import CachedClient
from align.inference.completions import read_completion
from align.inference.endpoint_client import Endpoint, EndpointLost
from align.inference.requests import Request, RequestCache
from align.models.built_in import make_tiny_tokenizer
from tests.support.inference.fake_chat import FakeChat, completion, echo

KEY = "sk-very-secret"


@pytest.fixture
def fake() -> Iterator[FakeChat]:
    server = FakeChat()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.01)


def _endpoint(fake: FakeChat, drop: bool = False, **settings: Any) -> Endpoint:
    settings = {"url": fake.url, "model": "good-model", "concurrency": 4, "timeout": 5, "retries": 3} | settings
    return Endpoint(EndpointConfig(**settings), drop=drop)


def _requests(endpoint: Endpoint, count: int, **changed: Any) -> list[Request]:
    request = Request(endpoint.identity, [], max_tokens=20, temperature=0.5, seed=1)
    return [
        replace(request, messages=[{"role": "user", "content": f"q{number}"}], **changed) for number in range(count)
    ]


def _ask(endpoint: Endpoint, folder: Path, count: int = 10) -> list[str]:
    client = CachedClient(RequestCache(folder))
    return [answer.text or answer.error for answer in client.ask(endpoint, _requests(endpoint, count))]


def test_requests_have_seeds_and_answers_keep_their_order(fake: FakeChat, tmp_path: Path) -> None:
    fake.delay = 0.3  # long enough for a busy machine to start four threads
    endpoint = _endpoint(fake, extra={"top_k": 5})
    requests = _requests(endpoint, 12)
    answers = CachedClient(RequestCache(tmp_path)).ask(endpoint, [*requests, requests[3]])
    assert [answer.text for answer in answers[:12]] == [
        f"q{n} / {request.own_seed}" for n, request in enumerate(requests)
    ]
    assert answers[12] == answers[3]
    assert sorted(fake.prompts()) == sorted(f"q{n}" for n in range(12))
    assert fake.most_under_way == 4
    assert fake.bodies[0] == {
        "model": "good-model", "messages": [{"role": "user", "content": "q0"}], "max_tokens": 20, "temperature": 0.5,
        "top_p": 1.0, "seed": requests[0].own_seed, "top_k": 5,
    }  # fmt: skip


def test_a_mark_of_training_stays_here(fake: FakeChat, tmp_path: Path) -> None:
    """Servers refuse fields of a message that they do not know."""
    endpoint = _endpoint(fake)
    turns = [{"role": "assistant", "content": "a", "train": False}, {"role": "user", "content": "b"}]
    (request,) = _requests(endpoint, 1)
    CachedClient(RequestCache(tmp_path)).ask(endpoint, [replace(request, messages=turns)])
    assert fake.bodies[0]["messages"] == [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "x1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_tools_calls_and_results_go_as_openai_has_them(fake: FakeChat, tmp_path: Path) -> None:
    endpoint = _endpoint(fake)
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "tool", "content": "2", "tool_call_id": "x1", "name": "add"},
    ]
    request = Request(endpoint.identity, messages, max_tokens=20, tools=json.dumps([TOOL]))
    CachedClient(RequestCache(tmp_path)).ask(endpoint, [request])
    (body,) = fake.bodies
    assert body["tools"] == [TOOL]
    # Arguments are text there, also where rows have the object.
    assert body["messages"][1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert body["messages"][2]["tool_call_id"] == "x1"


def test_calls_in_an_answer_are_read_and_cached(fake: FakeChat, tmp_path: Path) -> None:
    reply = completion(None, finish_reason="tool_calls")
    calls = [CALL, {"id": "x2", "type": "function", "function": {"name": "add", "arguments": "{half"}}]
    reply["choices"][0]["message"]["tool_calls"] = calls
    fake.reply = lambda body: reply
    endpoint = _endpoint(fake)
    for _ in range(2):
        (answer,) = CachedClient(RequestCache(tmp_path)).ask(endpoint, _requests(endpoint, 1))
        assert answer.tool_calls == [
            {"id": "x1", "name": "add", "arguments": '{"a": 1}'},
            {"id": "x2", "name": "add", "arguments": "{half"},
        ]
        assert answer.finished and answer.text == ""
    assert len(fake.bodies) == 1


@pytest.mark.parametrize("calls", [[{}], ["add"], [{"function": {"arguments": "{}"}}], [{"function": {"name": 3}}]])
def test_calls_that_are_none_are_no_completion(calls: Any) -> None:
    reply = completion("x")
    reply["choices"][0]["message"]["tool_calls"] = calls
    with pytest.raises(ValueError, match=r"KeyError|TypeError"):
        read_completion(reply)


def test_the_first_goes_alone(fake: FakeChat, tmp_path: Path) -> None:
    fake.delay = 0.5
    _ask(_endpoint(fake), tmp_path, 5)
    assert fake.times[1] - fake.times[0] >= 0.5
    assert fake.times[4] - fake.times[1] < 0.5


def test_fields_a_server_may_not_know_can_be_left_out(fake: FakeChat, tmp_path: Path) -> None:
    _ask(_endpoint(fake, send_seed=False, length_field="max_completion_tokens"), tmp_path, 1)
    assert "seed" not in fake.bodies[0] and "max_tokens" not in fake.bodies[0]
    assert fake.bodies[0]["max_completion_tokens"] == 20


def test_nothing_answered_is_asked_again(fake: FakeChat, tmp_path: Path) -> None:
    first = _ask(_endpoint(fake), tmp_path, 6)
    assert _ask(_endpoint(fake), tmp_path, 9)[:6] == first
    assert sorted(fake.prompts()) == sorted(f"q{n}" for n in range(9))


def _failing(*failures: Any) -> Any:
    """Fails the first times it is asked, then answers."""
    left = list(failures)
    return lambda body: left.pop(0) if left else echo(body)


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"error": {"message": "slow down"}}),
        (500, b"oops"),
        (503, {}),
        (408, {}),
        (200, b"<html>not json"),
        (200, {"choices": []}),
        (200, {"choices": [{"message": {"content": 5}}]}),
        (200, {"choices": [{"message": None}]}),
        (200, []),
        (200, b"[" * 200_000),
        (200, b'{"choices": [{"message": {"content": ' + b"[" * 200_000),
        (200, {"choices": ["text"]}),
        (200, {"choices": [{"message": {"content": "hi"}}], "usage": [1]}),
        (500, b"[" * 200_000),
        (429, {}, {"retry-after": "nan"}),
        (429, {}, {"retry-after": "Mon, 99 Foo 99999 00:00:00 GMT"}),
        (200, b"x", {"Content-Encoding": "gzip"}),
    ],
    ids=lambda failure: f"{failure[0]} {str(failure[1])[:20]}",
)
def test_what_may_pass_is_tried_again(fake: FakeChat, tmp_path: Path, failure: Any) -> None:
    fake.reply = _failing(failure, failure)
    endpoint = _endpoint(fake)
    assert _ask(endpoint, tmp_path, 1)[0].startswith("q0 / ")
    assert len(fake.bodies) == 3 and endpoint.retried == 2


def test_a_dropped_connection_is_tried_again(fake: FakeChat, tmp_path: Path) -> None:
    dropped = iter([True, True, False])

    def reply(body: dict[str, Any]) -> Any:
        if next(dropped):
            raise ConnectionError
        return echo(body)

    fake.reply = reply
    assert _ask(_endpoint(fake), tmp_path, 1)[0].startswith("q0 / ")


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honored_by_all_under_way(fake: FakeChat, tmp_path: Path, form: str) -> None:
    calls = itertools.count()

    def reply(body: dict[str, Any]) -> Any:
        if next(calls) == 2:
            date = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: between 1 and 2 from now
            return 429, {}, {"Retry-After": "1" if form == "seconds" else date}
        return echo(body)

    fake.reply, fake.delay = reply, 0.05
    _ask(_endpoint(fake), tmp_path, 12)
    gaps = [after - before for before, after in itertools.pairwise(fake.times)]
    assert max(gaps) > 0.85
    assert len(fake.bodies) == 13


def test_too_long_wait_ends_the_run(fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = _failing((429, {"error": {"message": "daily limit"}}, {"Retry-After": "86400"}))
    with pytest.raises(EndpointLost, match=r"status 429: daily limit and asks to wait 86400 s.*kept: run again"):
        _ask(_endpoint(fake), tmp_path)


def test_last_retry_ends_the_run_and_keeps_answers(fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = lambda body: (500, b"broken") if body["messages"][0]["content"] == "q6" else echo(body)
    with pytest.raises(EndpointLost, match=r"answered with status 500: broken; gave up after 3 attempts"):
        _ask(_endpoint(fake, retries=2), tmp_path)
    answered = len(RequestCache(tmp_path))
    assert 6 <= answered <= 9
    fake.reply = echo
    fake.bodies.clear()
    assert len(_ask(_endpoint(fake), tmp_path)) == 10
    assert len(fake.bodies) == 10 - answered


def test_after_a_failure_nothing_new_is_sent(fake: FakeChat, tmp_path: Path) -> None:
    fake.delay = 0.01
    fake.reply = lambda body: (500, b"broken") if body["messages"][0]["content"] == "q6" else echo(body)
    with pytest.raises(EndpointLost):
        _ask(_endpoint(fake, retries=0), tmp_path, 200)
    assert len(fake.bodies) < 15


def test_a_timeout_says_what_was_waited_for(fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = fake.hang
    began = time.monotonic()
    with pytest.raises(
        EndpointLost, match=r"did not answer /chat/completions within 0.3 s \(endpoint.timeout\).*one at"
    ):
        _ask(_endpoint(fake, timeout=0.3, retries=0), tmp_path)
    assert time.monotonic() - began < 2
    assert len(RequestCache(tmp_path).lost) == 1


def test_an_answer_that_trickles_in_is_bounded_too(fake: FakeChat, tmp_path: Path) -> None:
    real = fake.http.RequestHandlerClass._send  # type: ignore[attr-defined]

    def trickle(self: Any, status: int, content: Any, headers: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b" ")
            time.sleep(0.05)

    fake.http.RequestHandlerClass._send = trickle  # type: ignore[attr-defined]
    try:
        with pytest.raises(EndpointLost, match=r"within 0.4 s"):
            _ask(_endpoint(fake, timeout=0.4, retries=0), tmp_path)
    finally:
        fake.http.RequestHandlerClass._send = real  # type: ignore[attr-defined]


def test_an_endless_answer_is_refused(fake: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client.Endpoint, "max_bytes", 1 << 20)
    fake.reply = lambda body: b" " * (3 << 20)
    with pytest.raises(EndpointLost, match="sent more than 1 MiB"):
        _ask(_endpoint(fake, retries=0), tmp_path)
    assert len(RequestCache(tmp_path).lost) == 1


def test_an_answer_that_unpacks_without_end_is_refused(
    fake: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_client.Endpoint, "max_bytes", 1 << 20)
    bomb = gzip.compress(b" " * (64 << 20))
    fake.reply = lambda body: (200, bomb, {"Content-Encoding": "gzip"})
    with pytest.raises(EndpointLost, match="sent more than 1 MiB"):
        _ask(_endpoint(fake, retries=0), tmp_path)


def test_a_list_of_models_that_nests_or_grows_without_end(fake: FakeChat, tmp_path: Path) -> None:
    real = fake.http.RequestHandlerClass._send  # type: ignore[attr-defined]
    fake.reply = lambda body: (404, {"error": "no such model"})
    for content in (b"[" * 200_000, b" " * (endpoint_client.MAX_MODELS_BYTES + 2)):

        def send(self: Any, status: int, message: Any, headers: dict[str, str], content: bytes = content) -> None:
            real(self, status, content if status == 200 else message, headers)

        fake.http.RequestHandlerClass._send = send  # type: ignore[attr-defined]
        try:
            with pytest.raises(UserError, match=r"Is endpoint\.url its address up to /v1"):
                _ask(_endpoint(fake), tmp_path)
        finally:
            fake.http.RequestHandlerClass._send = real  # type: ignore[attr-defined]


def test_server_errors_are_shown_without_control_characters(fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = lambda body: (400, {"error": {"message": "\u202edrow \u200bhttps://me:geheim@proxy:1 \x1b[2J"}})
    with pytest.raises(UserError) as caught:
        _ask(_endpoint(fake), tmp_path)
    message = str(caught.value)
    assert "\\u202edrow \\u200bhttps://***@proxy:1" in message
    assert "geheim" not in message and "\x1b" not in message


def test_counts_that_no_answer_has_are_not_believed() -> None:
    usage = {"prompt_tokens": 10**400, "completion_tokens": True}
    answer = read_completion(completion("hi", usage=usage))
    assert (answer.prompt_tokens, answer.completion_tokens) == (None, None)


def test_an_unreachable_endpoint_is_named_at_once(fake: FakeChat, tmp_path: Path) -> None:
    fake.stop()
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"endpoint.url: http://127.0.0.1:\d+/v1 could not be asked: ConnectError.*Start"
    ):
        _ask(_endpoint(fake), tmp_path)
    assert time.monotonic() - began < 1


def test_a_wrong_model_is_named_with_the_nearest(fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = lambda body: (404, {"error": {"message": "model not found"}})
    with pytest.raises(
        UserError, match=r"404: model not found. endpoint.model: it has no 'god-model'. Did you mean 'good-"
    ):
        _ask(_endpoint(fake, model="god-model"), tmp_path)
    assert len(fake.bodies) == 1
    with pytest.raises(UserError, match=r"no route /v1/v1/chat/completions.*'good-model'"):
        _ask(_endpoint(fake, url=fake.url + "/v1"), tmp_path)


@pytest.mark.parametrize(
    ("status", "text"), [(401, "refuses the key in CHAT_KEY"), (402, "402"), (307, "to /elsewhere")]
)
def test_settings_at_fault_end_the_run(
    fake: FakeChat, tmp_path: Path, status: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_KEY", KEY)
    fake.reply = lambda body: (status, {"error": f"bad {KEY}\x1b[31m"}, {"Location": "/elsewhere"})
    with pytest.raises(UserError, match=text) as caught:
        _ask(_endpoint(fake, drop=True, key_variable="CHAT_KEY"), tmp_path)
    assert "***" in str(caught.value) and KEY not in str(caught.value) and "\x1b" not in str(caught.value)


def test_the_key_goes_into_the_header_and_nowhere_else(
    fake: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAT_KEY", KEY)
    endpoint = _endpoint(fake, key_variable="CHAT_KEY")
    _ask(endpoint, tmp_path, 2)
    assert fake.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in "".join(file.read_text() for file in tmp_path.iterdir())
    assert KEY not in repr(endpoint.config) + repr(endpoint.identity) + repr(_requests(endpoint, 1))
    monkeypatch.setenv("CHAT_KEY", " ")
    with pytest.raises(UserError, match="environment variable CHAT_KEY is not set"):
        _endpoint(fake, key_variable="CHAT_KEY")
    monkeypatch.setenv("CHAT_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(UserError, match="what CHAT_KEY holds is no key") as caught:
        _endpoint(fake, key_variable="CHAT_KEY")
    assert KEY not in str(caught.value)


def test_a_refused_request_ends_the_run_or_is_dropped(fake: FakeChat, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Any:
        bad = body["messages"][0]["content"] in ("q0", "q2")
        return (400, {"error": {"message": "too long"}}) if bad else echo(body)

    fake.reply = reply
    with pytest.raises(UserError, match=r"refuses the request with status 400: too long.*on_error: drop"):
        _ask(_endpoint(fake), tmp_path)
    answers = _ask(_endpoint(fake, drop=True), tmp_path, 5)
    assert answers[0] == answers[2] == "refuses the request with status 400: too long"
    assert [answer.split(" / ")[0] for answer in answers[3:]] == ["q3", "q4"]
    assert len(RequestCache(tmp_path)) == 3, "what failed is not kept"


def test_answers_never_readable_are_dropped_where_asked(fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = lambda body: b"{" if body["messages"][0]["content"] == "q1" else echo(body)
    answers = _ask(_endpoint(fake, drop=True, retries=1), tmp_path, 3)
    assert answers[1].startswith("gave an answer that is no chat completion")
    assert len(RequestCache(tmp_path).lost) == 2, "the server may charge for what nobody can read"
    with pytest.raises(EndpointLost, match="no chat completion"):
        _ask(_endpoint(fake, retries=1), tmp_path / "other", 3)


def test_what_a_completion_says() -> None:
    assert read_completion(completion("hi")).finished
    assert not read_completion(completion("hi", finish_reason="length")).finished
    assert read_completion(completion(None, refusal="I will not")).refused
    assert read_completion(completion("", finish_reason="content_filter")).refused
    assert read_completion(completion(None)).text == ""
    assert read_completion(completion("a\ud800b")).text == "a?b"
    assert read_completion(completion("hi", usage=None)).prompt_tokens is None
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert read_completion({"choices": [{"message": {"content": parts}}]}).text == "ab"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"url": "http://api.example.com/v1"}, "in the clear; use https"),
        ({"url": "http://127.0.0.1.example.com/v1"}, "in the clear"),
        ({"url": "https://me:secret@api.example.com/v1"}, "holds a name or password"),
        ({"url": "ftp://api.example.com"}, "should look like"),
        ({"url": "https://api.example.com/v1?key=5"}, "without a query"),
        ({"url": "https://api.example.com/v1/chat/completions"}, "should end before"),
        ({"price_input": 1}, "set together"),
        ({"extra": {"n": 4, "model": "x"}}, "extra sets model, n"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        EndpointConfig(**{"url": "https://api.example.com/v1", "model": "m"} | settings)


def test_identity_is_what_decides_the_answer() -> None:
    first = EndpointConfig(url="https://api.example.com/v1/", model="m")
    assert first.identity() == {"endpoint": "https://api.example.com/v1", "model": "m"}
    second = first.model_copy(update={"timeout": 3, "retries": 0, "price_input": 1.0, "price_output": 2.0})
    assert second.identity() == first.identity()
    moved = [EndpointConfig(url=f"http://127.0.0.1:{port}/v1", model="m", name="ours") for port in (8000, 8001)]
    assert moved[0].identity() == moved[1].identity()
    assert EndpointConfig(url=first.url, model="m", extra={"top_k": 2}).identity() != first.identity()


def test_server_that_is_away_is_waited_for_by_time(
    fake: FakeChat, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = _endpoint(fake, retries=1, patience=30)
    assert len(_ask(endpoint, tmp_path, 1)) == 1
    port = fake.http.server_address[1]
    fake.stop()
    restarted: list[FakeChat] = []
    timer = threading.Timer(0.6, lambda: restarted.append(FakeChat(port=port)))
    timer.start()
    try:
        assert _ask(endpoint, tmp_path, 8)[7].startswith("q7 / ")
    finally:
        timer.join()
        restarted[0].stop()
    # With retries: 1 it would have given up after 0.01 s. All requests share two lines in the log.
    assert endpoint.retried > 2
    first, last = caplog.messages
    assert "could not be asked" in first and first.endswith("waiting up to 30s (endpoint.patience)")
    assert last.endswith("answers again after 1s")


@pytest.mark.parametrize("reply", [(502, "bad gateway"), (503, {}, {"Retry-After": "0"})])
def test_patience_ends_and_message_says_how_long(fake: FakeChat, tmp_path: Path, reply: Any) -> None:
    endpoint = _endpoint(fake, retries=1, patience=1.2, concurrency=1)
    _ask(endpoint, tmp_path, 1)
    fake.reply = lambda body: reply
    limits = r"\(endpoint.retries, endpoint.patience\)\. What was answered is kept"
    began = time.monotonic()
    with pytest.raises(EndpointLost, match=rf"gave up after \d+ attempts in 1s {limits}"):
        _ask(endpoint, tmp_path, 4)
    assert 1.2 <= time.monotonic() - began < 5
    # Pauses grow, also if the server asks for none.
    assert 4 <= len(fake.bodies) < 16
    # The server is still away: the next batch waits for the retries only.
    began = time.monotonic()
    with pytest.raises(EndpointLost, match="gave up after 2 attempts in"):
        _ask(endpoint, tmp_path, 4)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("reply", [(503, "starting"), "cut"])
def test_server_that_never_answered_gets_no_patience(fake: FakeChat, tmp_path: Path, reply: Any) -> None:
    fake.reply = fake.refuse if reply == "cut" else lambda body: reply
    with pytest.raises(EndpointLost, match=r"gave up after 2 attempts \(endpoint.retries\)"):
        _ask(_endpoint(fake, retries=1), tmp_path)


@pytest.mark.parametrize(("text", "seconds"), [("15m", 900), ("2h", 7200), ("90s", 90), ("1.5m", 90), (7, 7)])
def test_times_have_units(fake: FakeChat, text: Any, seconds: float) -> None:
    assert _endpoint(fake, patience=text).config.patience == seconds


def test_time_without_unit_is_refused(fake: FakeChat) -> None:
    with pytest.raises(ValidationError, match="'15 minutes' is not a time; write seconds as a number, or 30s, 15m"):
        _endpoint(fake, patience="15 minutes")


def test_cut_connections_end_after_the_retries(fake: FakeChat, tmp_path: Path) -> None:
    endpoint = _endpoint(fake, retries=2)
    _ask(endpoint, tmp_path, 1)
    fake.reply = fake.refuse
    began = time.monotonic()
    with pytest.raises(EndpointLost, match=r"gave up after 3 attempts \(endpoint.retries\)"):
        _ask(endpoint, tmp_path, 4)
    assert time.monotonic() - began < 5


def test_server_that_answers_others_is_not_away(fake: FakeChat, tmp_path: Path) -> None:
    fake.delay = 0.02
    endpoint = _endpoint(fake, retries=2, concurrency=2)
    fake.reply = lambda body: (503, "no") if body["messages"][0]["content"] == "q3" else echo(body)
    with pytest.raises(EndpointLost, match="answered with status 503: .* gave up after"):
        _ask(endpoint, tmp_path, 200)
    assert len(fake.bodies) < 60


@pytest.mark.parametrize(
    ("is_special", "prompt", "text", "read"),
    [
        (True, "", "<|channel>thought\n9 or 10\n<channel|>#### 42<|im_end|>", "<think>\n9 or 10\n</think>\n\n#### 42"),
        (True, "", "<|channel>thought\n9", "<think>\n9"),
        (True, "<|channel>thought\n", "9 or 10\n<channel|>42", "<think>\n9 or 10\n</think>\n\n42"),
        (True, "", "42", "42"),
        (False, "", "<|channel>thought\n9\n<channel|>42", "<|channel>thought\n9\n<channel|>42"),
    ],
)
def test_thoughts_in_special_tokens_are_asked_for(
    fake: FakeChat, tmp_path: Path, is_special: bool, prompt: str, text: str, read: str
) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=is_special) for mark in ("<|channel>", "<channel|>")])
    tokenizer.chat_template += f"{{% if add_generation_prompt and a is not defined %}}{{{{ {prompt!r} }}}}{{% endif %}}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    fake.card = {"owned_by": "vllm", "root": str(tmp_path / "model")}

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        skips = body.get("skip_special_tokens", True) and is_special
        return completion(re.sub(r"<\|?(channel|im_end)\|?>", "", text) if skips else text)

    fake.reply = reply
    assert _ask(_endpoint(fake), tmp_path / "cache", 3) == [read] * 3
    assert [body.get("skip_special_tokens") for body in fake.bodies] == (
        [None] + [False] * 3 if is_special else [None] * 3
    )
    # A variable of the template may close the thought in the prompt.
    if prompt:
        endpoint = _endpoint(fake, extra={"chat_template_kwargs": {"a": 1}})
        text = "42"
        assert _ask(endpoint, tmp_path / "cache", 2) == ["42"] * 2
    fake.card = {"owned_by": "somebody", "root": str(tmp_path / "model")}
    assert "skip_special_tokens" not in (_ask(_endpoint(fake, name="b"), tmp_path / "cache", 1) and fake.bodies[-1])
