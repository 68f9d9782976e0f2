"""Between two calls on a GPU the engine sleeps. A stand-in for ``vllm.LLM`` says when; no GPU is needed, nor vLLM."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from align.config.runtime import EngineConfig, Runtime
from align.inference import engine as engines
from align.inference.protocol import Sampling, TurnRequest
from align.inference.sessions import open_session
from align.inference.vllm import VllmEngine
from align.inference.weights import checkpoint_weights


class FakeLLM:
    """Refuses, as vLLM's memory does, to be used where it sleeps."""

    def __init__(self, **options: Any) -> None:
        self.options, self.heard = options, []
        self.asleep: set[str] = set()
        worker = SimpleNamespace(model_runner=SimpleNamespace(reload_weights=self.reload_weights, model=None))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(worker=worker))
        inner = SimpleNamespace(scheduler=SimpleNamespace(has_requests=bool), batch_queue=None)
        core = SimpleNamespace(engine_core=inner)
        self.llm_engine = SimpleNamespace(
            model_executor=executor, engine_core=core, step=self.step, abort_request=self.heard.append
        )
        self.model_config = SimpleNamespace(hf_config=SimpleNamespace(model_type="llama", tie_word_embeddings=True))

    def sleep(self, level: int) -> None:
        assert self.options["enable_sleep_mode"]
        self.heard.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> None:
        self.heard.append(f"wake {' '.join(tags)}")
        self.asleep -= set(tags)

    def enqueue(self, prompt: dict[str, list[int]], params: Any, use_tqdm: bool) -> list[str]:
        assert not self.asleep
        self.heard.append("enqueue")
        logprob = SimpleNamespace(logprob=-1.0)
        sampled = SimpleNamespace(token_ids=[2], logprobs=[{2: logprob}])
        prompt_logprobs = [{token: logprob} for token in prompt["prompt_token_ids"]]
        self.output = SimpleNamespace(
            request_id="0", finished=True, outputs=[sampled], prompt_logprobs=prompt_logprobs, num_cached_tokens=0
        )
        self.output.__dict__.update(prompt)
        return ["0-1a2b3c4d"]

    def step(self) -> list[Any]:
        assert not self.asleep
        self.heard.append("step")
        return [self.output]

    def reload_weights(self, weights_iterator: Any) -> None:
        assert "weights" not in self.asleep
        self.heard.append("reload")
        list(weights_iterator)

    def reset_prefix_cache(self) -> bool:
        return True


@pytest.fixture
def open_engine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``open_engine(device, **engine settings)``."""
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("align.inference.vllm.draw_once_per_row", lambda runner, pick: None)
    monkeypatch.setattr("align.inference.vllm.cpu_block_size", lambda model_dir, dtype, max_length: 32)
    monkeypatch.setattr("align.inference.vllm._prepare_environment", lambda: None)
    monkeypatch.setattr("align.inference.vllm.runs_by_transformers", lambda model_dir: False)
    monkeypatch.setattr("align.inference.vllm.use_cpu_norms", lambda: False)
    monkeypatch.setattr("align.inference.vllm.flatten_rotary", lambda model: None)
    monkeypatch.setattr("align.inference.vllm.reload_on_cpu", lambda model: nullcontext())

    def make(device: str, **settings: Any) -> VllmEngine:
        config = EngineConfig(name="vllm", **settings)
        return VllmEngine(
            tiny_model, device=torch.device(device), dtype=torch.float32, config=config, max_length=64, seed=0
        )

    return make


def test_it_sleeps_while_the_trainer_learns(open_engine: Any, tiny_model: Path) -> None:
    engine = open_engine("cuda")
    for _ in range(2):
        engine.load_weights(checkpoint_weights(tiny_model))
        engine.generate([[1, 30]], Sampling(1))
    first = ["reload", "enqueue", "step", "sleep 1"]
    # The cache is woken behind the weights: it would be in the way of the trainer, which merges adapters meanwhile.
    assert engine.llm.heard == [*first, "wake weights", "reload", "wake kv_cache", *first[1:]]


def test_whatever_is_asked_of_it_wakes_it(open_engine: Any) -> None:
    engine = open_engine("cuda")
    engine.generate([[1, 30]], Sampling(1))
    engine.llm.heard.clear()
    engine.score_tokens([[1]], [[30]], 1.0)
    engine.generate([[1, 30]], Sampling(1))
    decoded = ["enqueue", "step"]
    assert engine.llm.heard == ["wake weights", "wake kv_cache", *decoded, *decoded, "sleep 1"]


@pytest.mark.parametrize(("device", "sleep"), [("cpu", True), ("cuda", False)])
def test_it_stays_awake_on_a_cpu_and_where_it_is_told_to(open_engine: Any, device: str, sleep: bool) -> None:
    engine = open_engine(device, sleep=sleep)
    engine.generate([[1, 30]], Sampling(1))
    assert engine.llm.heard == ["enqueue", "step"]
    assert not engine.llm.options.get("enable_sleep_mode")


def test_it_sleeps_once_a_session_is_closed(open_engine: Any) -> None:
    """Not between two turns: sleep would drop the cache, in which the second finds the first."""
    engine = open_engine("cuda")
    engine.generate([[1, 30]], Sampling(1))
    engine.llm.heard.clear()
    session = open_session(engine, 1.0)
    for prompt in ([1, 30], [1, 30, 2, 31]):
        session.submit(TurnRequest(0, prompt, 1, 0))
        assert [key for key, _ in session.poll()] == [0]
    session.close()
    woken = ["wake weights", "wake kv_cache"]
    assert engine.llm.heard == [*woken, "enqueue", "step", "enqueue", "step", "sleep 1"]


def test_a_session_that_is_closed_early_sleeps_too(open_engine: Any) -> None:
    engine = open_engine("cuda")
    session = open_session(engine, 1.0)
    session.submit(TurnRequest(0, [1, 30], 1, 0))
    session.close()
    assert engine.llm.heard == ["enqueue", ["0"], "sleep 1"]  # ["0"] was aborted


def test_it_sleeps_whole_after_only_its_weights_woke(open_engine: Any, tiny_model: Path) -> None:
    engine = open_engine("cuda")
    rooms: list[list[str]] = []
    engine.sleep_mode.make_room = lambda: rooms.append(list(engine.sleep_mode.asleep))
    engine.sleep_mode.sleep_all()
    engine.load_weights(checkpoint_weights(tiny_model))
    engine.sleep_mode.sleep_all()
    engine.sleep_mode.sleep_all()
    assert engine.llm.heard == ["sleep 1", "wake weights", "reload", "wake kv_cache", "sleep 1"]
    assert rooms == [["weights", "kv_cache"], ["kv_cache"]]  # before each part wakes


def test_open_engine_sleeps_if_a_base_takes_turns_with_it(
    open_engine: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del open_engine  # only its stand-in for vLLM
    monkeypatch.setattr("align.inference.engine._vllm_obstacle", lambda *arguments: None)
    monkeypatch.setattr("align.models.compute.processes.device_of", lambda runtime: torch.device("cuda"))
    for offload, heard in ((["base"], ["sleep 1"]), (["activations"], []), ("auto", [])):
        runtime = Runtime.model_validate({"engine": {"name": "vllm", "gpu_memory": 0.7}, "offload": offload})
        engine: Any = engines.open_engine(
            tiny_model, runtime, precision="float32", max_length=64, seed=0, warn=lambda text: None
        )
        assert engine.llm.heard == heard
        assert engine.llm.options["gpu_memory_utilization"] == 0.7
