"""The server engine against a stand-in that hangs, dies and talks nonsense: every call ends soon, with the reason."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.runtime import Runtime
from align.errors import UserError
from align.inference.engine import open_engine
from align.inference.protocol import Sampling
from align.inference.servers import server_client
from align.inference.servers.pool import PoolEngine
from align.inference.servers.server import ServerEngine
from align.inference.servers.server_client import BadReply, EngineLost
from align.inference.servers.server_options import ONE_PROCESS
from align.inference.servers.server_process import BINDING
from align.inference.transport import Transport, background_loop
from align.inference.weights import checkpoint_weights
from tests.support.inference.fake_server import EOS, FakeServer, completion
from tests.support.inference.server_harness import PROMPTS, served_at, soon, wait_for
from tests.support.models.families import write_family

# ---- how servers are started ----


@pytest.mark.parametrize(
    ("device", "tensor_parallel", "binding", "in_one_process"),
    [("cpu", 1, None, True), ("cpu", 2, None, False), ("cpu", 1, "0-3", False), ("cuda", 1, None, False)],
)
def test_unbound_cpu_server_of_one_rank_has_no_worker_process(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    tensor_parallel: int,
    binding: str | None,
    in_one_process: bool,
) -> None:
    monkeypatch.delenv(BINDING, raising=False)
    if binding is not None:
        monkeypatch.setenv(BINDING, binding)
    spec = served_at(tiny_model, [], tensor_parallel=tensor_parallel)
    options = replace(spec, device=torch.device(device)).options()
    assert (" ".join(ONE_PROCESS) in " ".join(options)) == in_one_process


def test_cpu_server_of_a_hybrid_caches_no_prefixes(tiny_model: Path, tmp_path: Path) -> None:
    hybrid = write_family("lfm2", tmp_path / "lfm2")
    cached = [served_at(model, []).options()[-5:] for model in (tiny_model, hybrid)]
    assert ["--no-enable-prefix-caching" in options for options in cached] == [False, True]


# ---- what is asked, and what is made of the answers ----


def test_answers_keep_their_places(fake: FakeServer, served: ServerEngine) -> None:
    def later_ones_first(body: dict[str, Any]) -> Any:
        time.sleep(0.1 if body["prompt"] == PROMPTS[0] else 0.01)
        return completion(body)

    fake.answers["/v1/completions"] = later_ones_first
    sampling, observations = Sampling(5, temperature=0.7, top_p=0.9, n=2, seed=3), []
    draws = served.generate(PROMPTS, sampling, lambda done, total: observations.append((done, total)))
    for index, responses in enumerate(draws):
        for sample, response in enumerate(responses):
            seed = sampling.request_seed(index, sample)
            assert (
                response.token_ids
                == completion({"seed": seed, "max_tokens": 5, "prompt": [1]})["choices"][0]["token_ids"]
            )
            assert response.logprobs == [-token / 100 for token in response.token_ids]
            assert response.finished == (response.token_ids[-1] == EOS) == bool(seed % 2)
            assert response.text == served.tokenizer.decode(response.token_ids, skip_special_tokens=True)
    assert {response.finished for responses in draws for response in responses} == {True, False}
    assert observations == [(done, 24) for done in range(1, 25)]
    assert 2 <= fake.most_under_way <= 4  # batch_size
    body = dict(fake.calls)["/v1/completions"]
    assert body.items() >= {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "logprobs": 0}.items()
    assert body.items() >= {"stop_token_ids": [EOS], "ignore_eos": True, "return_token_ids": True}.items()


def test_given_tokens_are_scored_at_their_places(served: ServerEngine) -> None:
    assert served.score_tokens(PROMPTS[:2], [[40, 41], [50]], 1.0) == [[-40.0, -41.0], [-50.0]]
    with pytest.raises(ValueError, match="at temperature 1 only"):
        served.score_tokens(PROMPTS[:1], [[40]], 0.7)


# ---- servers that do not answer ----


def test_a_hanging_server(fake: FakeServer, served: ServerEngine) -> None:
    served.client.timeout = 0.6
    fake.answers["/v1/completions"] = fake.hang
    with soon(), pytest.raises(EngineLost) as caught:
        served.generate(PROMPTS, Sampling(4))
    message = str(caught.value)
    assert f"at {fake.address} did not answer /v1/completions within 0.6 s (runtime.engine.timeout)" in message
    assert "This run did not start it" in message
    assert "/health answers" in message


def test_a_server_that_hangs_at_everything(fake: FakeServer, served: ServerEngine) -> None:
    served.client.timeout = 0.6
    fake.answers |= {"/v1/completions": fake.hang, "/health": fake.hang}
    with soon(), pytest.raises(EngineLost, match="within 0.6 s .* /health does not answer"):
        served.generate(PROMPTS, Sampling(4))


def test_a_server_that_sends_a_byte_now_and_then(fake: FakeServer, served: ServerEngine) -> None:
    served.client.timeout = 0.6
    fake.answers["/v1/completions"] = lambda body: ("trickled", completion(body))  # 20 s for the whole of it
    with soon(), pytest.raises(EngineLost, match=r"did not answer /v1/completions within 0\.6 s"):
        served.generate(PROMPTS[:1], Sampling(8))


def test_a_server_that_dies_during_a_call(fake: FakeServer, served: ServerEngine) -> None:
    def die(body: Any) -> Any:
        time.sleep(0.1)
        fake.stop()
        raise ConnectionError

    fake.answers["/v1/completions"] = lambda body: die(body) if body["prompt"] == PROMPTS[5] else completion(body)
    with soon(), pytest.raises(EngineLost) as caught:
        served.generate(PROMPTS, Sampling(4))
    assert re.search(
        r"could not be asked for /v1/completions: \w+: .* after \d\.\d s of at most 30\.", str(caught.value)
    )
    assert "/health does not answer" in str(caught.value)
    with soon(), pytest.raises(EngineLost, match=r"collective_rpc: ConnectionRefusedError"):
        served.load_weights(checkpoint_weights(served.spec.model_dir))


@pytest.mark.parametrize("status", ["dropped", "halved"])
def test_an_answer_that_breaks_off(fake: FakeServer, served: ServerEngine, status: str) -> None:
    fake.answers["/v1/completions"] = fake.drop if status == "dropped" else lambda body: (status, completion(body))
    with (
        soon(),
        pytest.raises(EngineLost, match="could not be asked for /v1/completions: RemoteProtocolError"),
    ):
        served.generate(PROMPTS, Sampling(4))


def test_an_engine_that_died_behind_its_server(fake: FakeServer, served: ServerEngine) -> None:
    fake.answers["/v1/completions"] = lambda body: (500, {"error": {"message": "EngineCore encountered an issue"}})
    with soon(), pytest.raises(BadReply, match="status 500: .*EngineCore encountered an issue"):
        served.generate(PROMPTS, Sampling(4))
    fake.answers["/health"] = lambda body: (503, b"")
    with soon(), pytest.raises(EngineLost, match="EngineCore encountered an issue.*/health answers with status 503"):
        served.generate(PROMPTS, Sampling(4))


@pytest.mark.parametrize("late", [False, True])
def test_no_call_is_left_waiting(
    fake: FakeServer, served: ServerEngine, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call fails while the others wait for an answer, or have not even been sent."""
    exchange = Transport.exchange

    async def exchange_later(transport: Transport, method: str, path: str, content: Any = None, **options: Any) -> Any:
        if late and content is not None and json.loads(content)["prompt"] != PROMPTS[0]:
            await asyncio.sleep(0.5)
        return await exchange(transport, method, path, content, **options)

    monkeypatch.setattr(Transport, "exchange", exchange_later)
    fake.answers["/v1/completions"] = lambda body: b"?" if body["prompt"] == PROMPTS[0] else fake.hang(body)
    with soon(), pytest.raises(BadReply, match="it is not JSON"):
        served.generate(PROMPTS, Sampling(4))
    wait_for(lambda: not asyncio.all_tasks(background_loop()))
    if late:
        assert [body["prompt"] for path, body in fake.calls if path == "/v1/completions"] == [PROMPTS[0]]


# ---- answers that are not what was asked for ----


def _changed(**fields: Any) -> Callable[[Any], Any]:
    """A completion whose choice has other fields; None leaves one out."""

    def answer(body: Any) -> Any:
        full = completion(body)
        choice = {**full["choices"][0], **fields}
        return {"choices": [{name: value for name, value in choice.items() if value is not None}]}

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda body: b"<html>Bad gateway</html>", "it is not JSON. It began with <html>Bad gateway"),
        (lambda body: [], "it lacks choices"),
        (lambda body: {"choices": []}, "choices is no list of one choice"),
        (lambda body: {"choices": completion(body)["choices"] * 2}, "choices is no list of one choice"),
        (_changed(token_ids=None), "it lacks token_ids"),
        (_changed(token_ids=[]), "token_ids is no list of 1 to 4 tokens"),
        (_changed(token_ids=[5] * 5), "token_ids is no list of 1 to 4 tokens"),
        (_changed(token_ids=["5"] * 4), "token_ids is no list of 1 to 4 tokens"),
        (_changed(token_ids=[True] * 4), "token_ids is no list of 1 to 4 tokens"),
        (_changed(token_ids=[5, -1, 5, 5]), "token_ids has -1, and there are 260 tokens"),
        (_changed(token_ids=[5, 5, 10**30, 5]), "token_ids has 1000000000000000000000000000000, and there are"),
        (_changed(logprobs={"token_logprobs": [-1.0, float("nan"), -1.0, -1.0]}), "token_logprobs has nan, no log"),
        (_changed(logprobs={"token_logprobs": [-1.0, float("-inf"), -1.0, -1.0]}), "token_logprobs has -inf, no"),
        (_changed(logprobs={"token_logprobs": [-1.0, 3.0, -1.0, -1.0]}), "token_logprobs has 3.0, no logarithm"),
        (lambda body: b"[" * 200_000, "it is not JSON. It began with [[[["),
        (_changed(logprobs=None), "it lacks logprobs.token_logprobs"),
        (_changed(logprobs={"token_logprobs": [-1.0] * 3}), "token_logprobs is no list of 4 numbers"),
        (_changed(logprobs={"token_logprobs": [-1.0, None, -1.0, -1.0]}), "token_logprobs is no list of 4 numbers"),
        (_changed(finish_reason="abort"), "it ended with 'abort'"),
        (_changed(finish_reason="stop", token_ids=[5, 6, 7, 8]), "it ended with 'stop' at token 8, where 2"),
        (_changed(prompt_token_ids=[1]), "prompt_token_ids is not the prompt that was sent"),
        (lambda body: (404, {"detail": "Not Found"}), "status 404: {\"detail\": \"Not Found\"}"),
    ],
)  # fmt: skip
def test_garbage(fake: FakeServer, served: ServerEngine, answer: Callable[[Any], Any], message: str) -> None:
    fake.answers["/v1/completions"] = answer
    with soon(), pytest.raises(BadReply, match=re.escape(message)) as caught:
        served.generate(PROMPTS, Sampling(4))
    assert fake.address in str(caught.value)


@pytest.mark.parametrize("value", ["-1", None, float("nan"), 2.0, True])
def test_scores_that_are_no_logprobs(fake: FakeServer, served: ServerEngine, value: Any) -> None:
    fake.answers["/v1/completions"] = _changed(prompt_logprobs=[None, {}, {}, {"40": {"logprob": value}}])
    with soon(), pytest.raises(BadReply, match="prompt_logprobs has no logarithms of probabilities"):
        served.score_tokens(PROMPTS[:1], [[40]], 1.0)


def test_an_answer_without_end(fake: FakeServer, served: ServerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "MAX_REPLY_BYTES", 1 << 20)
    fake.answers["/v1/completions"] = lambda body: b" " * (2 << 20)
    with soon(), pytest.raises(EngineLost, match="its answer has more than 1 MiB"):
        served.generate(PROMPTS, Sampling(4))


def test_a_trickle_in_answer_to_the_question_of_health(fake: FakeServer, served: ServerEngine) -> None:
    fake.answers |= {"/health": lambda body: ("trickled", b" " * 2000), "/v1/completions": fake.drop}
    with soon(), pytest.raises(EngineLost, match="/health does not answer"):
        served.generate(PROMPTS, Sampling(4))


def test_a_key_that_is_repeated_is_not_shown(fake: FakeServer, served: ServerEngine) -> None:
    key = os.environ["ALIGN_SERVER_KEY"]
    fake.answers["/v1/completions"] = lambda body: (500, {"error": f"Authorization: Bearer {key}"})
    with soon(), pytest.raises(BadReply, match=r"Bearer \*\*\*") as caught:
        served.generate(PROMPTS, Sampling(4))
    assert key not in str(caught.value)


def test_garbage_scores(fake: FakeServer, served: ServerEngine) -> None:
    fake.answers["/v1/completions"] = _changed(prompt_logprobs=[None, {"30": {"logprob": -1.0}}])
    with soon(), pytest.raises(BadReply, match=r"it lacks 3\.40\.logprob"):
        served.score_tokens(PROMPTS[:1], [[40]], 1.0)


# ---- configuration ----


def test_open_engine_takes_a_pool(fake: FakeServer, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(**pool: Any) -> PoolEngine:
        runtime = Runtime.model_validate({"rollouts": pool})
        engine = open_engine(tiny_model, runtime, precision="float32", max_length=64, seed=0, warn=print)
        assert isinstance(engine, PoolEngine)
        return engine

    engine = opened(addresses=f"{fake.address}/")
    assert (engine.name, engine.dtype) == ("vllm-server", torch.float32)
    assert [member.client.address for member in engine.members] == [fake.address]
    engine.close()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vLLM is not installed.*runtime\.rollouts\.addresses"):
        opened(servers=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes train"):
        opened(addresses=[fake.address])
