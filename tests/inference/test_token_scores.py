"""Requests for log-probabilities of given tokens, and what their replies must hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.config.endpoint import EndpointConfig
from align.inference.token_scores import ScoringEndpoint


def endpoint(api: str, top_k: int = 2) -> ScoringEndpoint:
    return ScoringEndpoint(EndpointConfig(url="http://127.0.0.1:9/v1", model="big"), api, top_k, "teacher.endpoint")


def reply(**choice: Any) -> dict[str, Any]:
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


def test_vllm_request_has_ids_and_no_temperature() -> None:
    vllm = endpoint("vllm")
    request = vllm.request([5, 6, 7], 1)
    assert vllm.body(request) == {"model": "big", "prompt": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 2}
    # The given token 7 is the least likely of three, so only the two others are kept.
    entries = [
        None,
        {"6": {"logprob": -0.1, "decoded_token": "b"}, "9": {"logprob": -3.0}},
        {"7": {"logprob": -9.0, "decoded_token": "c"}, "8": {"logprob": -0.5}, "9": {"logprob": -1.0}},
    ]
    positions = json.loads(vllm.parse(request, reply(prompt_logprobs=entries)).text)
    assert positions == [["b", None, [6, 9], [-0.1, -3.0]], ["c", None, [8, 9], [-0.5, -1.0]]]


def test_completions_are_located_behind_bos() -> None:
    provider = endpoint("completions")
    request = provider.request("Hi you", 2)
    assert provider.body(request) == {"model": "big", "prompt": "Hi you", "max_tokens": 1, "echo": True, "logprobs": 2}
    logprobs = {
        "tokens": ["<s>", "Hi", " you", "!"],
        "top_logprobs": [None, {"Hi": -1.0}, {" you": -0.2, " all": -2.0, " x": -4.0}, {"!": -0.1}],
    }
    positions = json.loads(provider.parse(request, reply(logprobs=logprobs)).text)
    assert positions == [[2, 6, [" you", " all"], [-0.2, -2.0]]]


@pytest.mark.parametrize(
    ("api", "choice", "message"),
    [
        ("vllm", {"text": "x"}, "it lacks prompt_logprobs; if the server is not vLLM, write `api: completions`"),
        ("vllm", {"prompt_logprobs": [None]}, "zip"),
        ("vllm", {"prompt_logprobs": [None, {"9": {"logprob": -1.0}}]}, "KeyError: '6'"),
        ("vllm", {"prompt_logprobs": [None, {"6": {"logprob": 0.7}}]}, "no logarithms of probabilities"),
        ("vllm", {"prompt_logprobs": [None, {"6": {"logprob": float("nan")}}]}, "no logarithms of probabilities"),
        ("completions", {"logprobs": None}, "TypeError"),
        ("completions", {"logprobs": {"tokens": ["x"], "top_logprobs": [None]}}, "was `echo` ignored"),
    ],
)
def test_unusable_reply_is_refused(api: str, choice: dict[str, Any], message: str) -> None:
    asked = endpoint(api)
    prompt: Any = [5, 6] if api == "vllm" else "ab"
    with pytest.raises(ValueError, match=message):
        asked.parse(asked.request(prompt, 1), reply(**choice))
