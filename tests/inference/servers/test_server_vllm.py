"""The server engine with a real vLLM server, which all of these share; the last test kills it."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from align.config.runtime import EngineConfig
from align.config.runtime.rollouts import RolloutsConfig
from align.config.tuning import LoraTuning
from align.inference.protocol import Sampling, TurnRequest
from align.inference.servers.server import COMPLETIONS, RESET, RPC, ServerEngine
from align.inference.servers.server_client import BadReply, EngineLost, WeightsChanged
from align.inference.servers.server_options import INFO, ServerSpec
from align.inference.servers.server_process import LocalServer
from align.inference.trainer_engine import ParityError, policy_weights, probe, trainer_logprobs
from align.inference.transformers import pick_tokens
from align.inference.weights import WeightsFolder, checkpoint_weights
from align.models.loading import load_policy
from align.models.tuning.apply import apply_tuning
from align.models.tuning.peft_layers import merged_weights
from tests.support.processes import command_of, descendants, is_alive

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

PROMPTS = [[1, 30 + i, 31, 32 + i] + [40 + i] * (3 * i) for i in range(8)]


def _open(model_dir: Path, address: str | None) -> ServerEngine:
    served = ServerSpec.of(
        model_dir,
        device=torch.device("cpu"),
        dtype=torch.float32,
        config=EngineConfig(cpu_kv_cache_gb=0.1, timeout=240),
        pool=RolloutsConfig(servers=1) if address is None else RolloutsConfig(addresses=[address]),
        max_length=128,
        seed=7,
    )
    engine = ServerEngine(served, WeightsFolder(served))
    if address is not None:
        engine.load_weights(checkpoint_weights(served.model_dir))
    return engine


@pytest.fixture(scope="module", autouse=True)
def threads_as_before() -> Iterator[None]:
    """Opening an engine sets the threads of this process and of those it starts, unseen by later tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[ServerEngine]:
    server_engine = _open(tiny_model, None)
    yield server_engine
    server_engine.close()


@pytest.fixture
def model(engine: ServerEngine) -> Any:
    """The model as it was saved, and a server that holds its weights."""
    engine.load_weights(checkpoint_weights(engine.spec.model_dir))
    return load_policy(engine.spec.model_dir)


def _local(engine: ServerEngine) -> LocalServer:
    assert engine.client.server is not None
    return engine.client.server


def _disturb(model: Any, name: str, size: float = 0.1) -> None:
    weight = model.get_parameter(name)
    weight.data += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))


def test_logprobs_are_the_models(engine: ServerEngine, model: Any) -> None:
    for temperature in (1.0, 0.7):
        responses = engine.generate(PROMPTS, Sampling(16, temperature=temperature, seed=3))
        actual = [entry for some in responses for entry in some]
        ours = trainer_logprobs(model, PROMPTS, [entry.token_ids for entry in actual], temperature)
        theirs = torch.tensor([value for entry in actual for value in entry.logprobs])
        assert (ours - theirs).abs().max() < 1e-3
    scored = engine.score_tokens(PROMPTS, [[50, 51, 52]] * len(PROMPTS), 1.0)
    ours = trainer_logprobs(model, PROMPTS, [[50, 51, 52]] * len(PROMPTS), 1.0)
    assert (torch.tensor(scored).flatten() - ours).abs().max() < 1e-3


def test_samples_follow_their_seeds(engine: ServerEngine, model: Any) -> None:
    draws = [engine.generate(PROMPTS, Sampling(16, n=2, seed=seed)) for seed in (3, 3, 4)]
    tokens = [[entry.token_ids for some in one_draw for entry in some] for one_draw in draws]
    assert tokens[0] == tokens[1] != tokens[2]
    assert draws[0][0][0].token_ids != draws[0][0][1].token_ids


def test_a_token_is_drawn_as_in_the_process_of_a_trainer(engine: ServerEngine, model: Any) -> None:
    """By one random number of the request's generator, as ``install_sampler`` has it."""
    sampling = Sampling(1, seed=11)
    for place, (response,) in enumerate(engine.generate(PROMPTS, sampling)):
        generator = torch.Generator().manual_seed(sampling.request_seed(place, 0))
        uniform = torch.rand((1,), generator=generator, dtype=torch.float64)
        with torch.inference_mode():
            logprobs = model(torch.tensor([PROMPTS[place]])).logits[:, -1].log_softmax(dim=-1)
        assert response.token_ids == pick_tokens(logprobs, uniform).tolist()


def test_it_tells_how_much_of_a_prompt_was_cached(engine: ServerEngine, model: Any) -> None:
    prompt = [1, *range(30, 94)]  # two blocks of 32, and a token
    body = engine.sampling_request(TurnRequest(0, prompt, 4, 0), 1.0, 1.0)
    answers = [engine.client.call(COMPLETIONS, body) for _ in range(2)]
    assert [engine.cached_tokens(answer) for answer in answers] == [0, 64]


def test_it_stops_at_our_end_token_and_says_so(
    engine: ServerEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "eos", 100)  # any common token: a random model rarely says the real one
    responses = [entry for some in engine.generate(PROMPTS * 8, Sampling(60, seed=1)) for entry in some]
    assert {entry.finished for entry in responses} == {True, False}
    for entry in responses:
        assert entry.finished == (entry.token_ids[-1] == 100)
        assert 100 not in entry.token_ids[:-1]
        assert entry.finished or len(entry.token_ids) == 60


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_are_taken_over(engine: ServerEngine, model: Any, name: str) -> None:
    """Every row of the tied embeddings moved is what an old head, or an old prefix, would show."""
    assert probe(engine, model, PROMPTS).mean_gap < 1e-4
    _disturb(model, name)
    with pytest.raises(ParityError, match="weights not loaded"):
        probe(engine, model, PROMPTS)
    engine.load_weights(pair for pair in merged_weights(model) if pair[0] != "lm_head.weight")
    assert probe(engine, model, PROMPTS).mean_gap < 1e-4


def test_adapters_are_taken_over(engine: ServerEngine) -> None:
    """The first load is of base and adapter, the second of an adapter only; the third follows another run's load."""
    policy = apply_tuning(load_policy(engine.spec.model_dir), LoraTuning(rank=4), seed=1)
    folders = []
    for update in range(3):
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(update))
        if update == 2:
            engine.client.call(
                RPC, {"method": "reload_weights", "kwargs": {"weights_path": str(engine.spec.model_dir)}}
            )
        engine.load_weights(policy_weights(policy))
        folders.append(engine.folder.announcement(engine.folder.version)["base"])
        assert probe(engine, policy, PROMPTS).mean_gap < 1e-4
    assert len(set(folders)) == 1
    engine.load_weights(merged_weights(load_policy(engine.spec.model_dir)))


def test_a_left_out_head_is_caught(engine: ServerEngine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM on a CPU goes on with its packed copy of the old head; only the probe can see it."""
    _disturb(model, "model.embed_tokens.weight")
    monkeypatch.setattr(engine.folder, "spec", replace(engine.spec, tied_embeddings=False))
    engine.load_weights(pair for pair in merged_weights(model) if pair[0] != "lm_head.weight")
    with pytest.raises(ParityError, match="tied output head"):
        probe(engine, model, PROMPTS)


def test_a_kept_prefix_is_caught(engine: ServerEngine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of the old weights would be read on: the reset is needed, and works."""
    prompts = [[1, *range(40, 120)]] * 2
    engine.generate(prompts, Sampling(2))
    _disturb(model, "model.layers.0.self_attn.v_proj.weight")
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_reset_prefix_cache", lambda: None)
        engine.load_weights(merged_weights(model))
    with pytest.raises(ParityError):
        probe(engine, model, prompts)
    engine.load_weights(merged_weights(model))
    assert probe(engine, model, prompts).mean_gap < 1e-4


def test_missing_weights_leave_the_server_as_it_was(engine: ServerEngine, model: Any) -> None:
    changed = load_policy(engine.spec.model_dir)
    _disturb(changed, "model.embed_tokens.weight")
    with pytest.raises(ValueError, match=r"lack model\.norm\.weight"):
        engine.load_weights(pair for pair in merged_weights(changed) if pair[0] != "model.norm.weight")
    assert probe(engine, model, PROMPTS).mean_gap < 1e-4


def test_vllm_still_has_what_is_asked_of_it(engine: ServerEngine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM ignores fields that it does not know, so a renamed one would change the samples without a word."""
    schema = engine.client.call("/openapi.json", method="GET")
    assert {COMPLETIONS, RPC, RESET, INFO, "/health"} <= set(schema["paths"])
    sent: list[dict[str, Any]] = []
    calls = engine.client.calls

    def spy(path: str, bodies: list[Any], *args: Any, **options: Any) -> list[Any]:
        sent.extend(body for body in bodies if path == COMPLETIONS)
        return calls(path, bodies, *args, **options)

    monkeypatch.setattr(engine.client, "calls", spy)
    engine.generate(PROMPTS[:1], Sampling(2))
    engine.score_tokens(PROMPTS[:1], [[50]], 1.0)
    fields = set(schema["components"]["schemas"]["CompletionRequest"]["properties"])
    assert len(sent) == 2
    assert {name for body in sent for name in body} <= fields


def test_no_route_answers_without_the_key(engine: ServerEngine, model: Any) -> None:
    """Of all that vLLM has, and what is mounted beside; nobody else's process can open the socket to begin with."""
    schema = engine.client.call("/openapi.json", method="GET")
    routes = [(path, method) for path, methods in schema["paths"].items() for method in methods]
    assert len(routes) > 20
    for path, method in [*routes, ("/metrics", "get"), ("/docs", "get"), ("/openapi.json", "get"), (RPC, "options")]:
        reply = engine.client.exchange(method.upper(), path, {}, 10, with_key=False)
        assert (path, reply.status, reply.error) == (path, 401, None)
    socket = Path(engine.client.address.removeprefix("unix:"))
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    for process in descendants(_local(engine).process.pid):
        listening = [entry for entry in process.net_connections("inet") if entry.status == psutil.CONN_LISTEN]
        assert all(entry.laddr.ip == "127.0.0.1" for entry in listening)
        assert engine.client._key not in command_of(process)


def test_a_foreign_reload_is_noticed(engine: ServerEngine, model: Any) -> None:
    """Somebody with the key has the workers read other weights, and then the right ones again."""
    engine.check_weights(content=True)
    folder = engine.folder.write(merged_weights(load_policy(engine.spec.model_dir)))
    for version in (folder, folder - 1):
        words = {"weights_path": str(engine.folder.path_of(version))}
        engine.client.call(RPC, {"method": "reload_weights", "kwargs": words})
        for content in (False, True):
            with pytest.raises(WeightsChanged, match="does not hold the weights that this run gave it"):
                engine.check_weights(content)
    engine.load_weights(merged_weights(model))
    began = time.monotonic()
    engine.check_weights()
    checked = time.monotonic()
    engine.check_weights(content=True)
    print(f"checked in {checked - began:.4f} s, with values in {time.monotonic() - checked:.4f} s")


def test_weights_other_than_those_announced_are_not_loaded(engine: ServerEngine, model: Any) -> None:
    version = engine.folder.write(merged_weights(model))
    engine.folder.digests[version] = "0" * 64
    with pytest.raises(BadReply, match="collective_rpc"):
        engine.read_weights(version)
    engine.check_weights(content=True)


def test_a_second_user_of_a_running_server(engine: ServerEngine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own server passes for one that somebody started with our options: it is checked, filled and left running."""
    monkeypatch.setenv("ALIGN_SERVER_KEY", engine.client._key)
    _disturb(model, "model.embed_tokens.weight")
    engine.load_weights(merged_weights(model))
    guest = _open(engine.spec.model_dir, engine.client.address)
    assert probe(guest, load_policy(engine.spec.model_dir), PROMPTS).mean_gap < 1e-4
    with pytest.raises(WeightsChanged, match="or uses the server too"):
        engine.check_weights()
    guest.close()
    assert engine.client.health() == "answers"


def test_the_model_runs_in_the_scheduler_s_process(engine: ServerEngine) -> None:
    commands = [command_of(entry) for entry in descendants(_local(engine).process.pid)]
    assert any("EngineCore" in command for command in commands)
    assert not any("Worker" in command for command in commands)


def test_a_hanging_engine_is_an_error_and_can_be_survived(engine: ServerEngine, model: Any) -> None:
    group = descendants(_local(engine).process.pid)
    core = next(entry for entry in group if "EngineCore" in command_of(entry))
    core.send_signal(signal.SIGSTOP)
    timeout, engine.client.timeout = engine.client.timeout, 1.5
    try:
        began = time.monotonic()
        with pytest.raises(
            EngineLost, match=r"did not answer /v1/completions within 1\.5 s .* is alive; /health answers"
        ):
            engine.generate(PROMPTS, Sampling(64))
        assert time.monotonic() - began < 10
    finally:
        core.send_signal(signal.SIGCONT)
        engine.client.timeout = timeout
    engine.load_weights(merged_weights(model))
    assert probe(engine, model, PROMPTS).mean_gap < 1e-4


def test_killed_during_a_call(engine: ServerEngine, model: Any) -> None:
    """The last one: nothing is left of the server, its engine included."""
    leader = _local(engine).process.pid
    group = descendants(leader)
    server = next(entry for entry in group if entry.ppid() == leader)
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.monotonic())
        server.kill()

    threading.Timer(0.3, kill).start()
    with pytest.raises(EngineLost, match=r"at unix:/\S+ .*Its process was ended by SIGKILL"):
        for seed in range(1000):
            engine.generate(PROMPTS * 8, Sampling(100, seed=seed))
    assert time.monotonic() - killed[0] < 10
    engine.close()
    assert len(group) >= 2  # API process, engine
    left = [entry for entry in group if is_alive(entry)]
    assert left == [], left
