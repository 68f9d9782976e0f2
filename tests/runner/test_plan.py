"""Which models a plan's memory is counted for: those that are finished, else what they start from, else it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.capacity.memory import Estimate
from align.capacity.plan import estimate_memory
from align.models.compute_types import ProductSpeed
from align.pipeline.pipeline import Node, Pipeline
from align.store.store import Store
from tests.support.records import put_record

RAW: dict[str, Any] = {
    "name": "memory",
    "runtime": {"device": "cpu", "engine": {"name": "transformers"}},
    "stages": {
        "model": {"source": "smollm2-135m-instruct"},
        "other": {"stage": "model", "source": "tiny"},
        "data": {"recipe": "data_recipes/embedded.yaml"},
        "sft": {"model": "model", "data": "data", "learning_rate": 1e-3},
        "sample": {"policy": "sft", "prompts": "data", "score": "gold"},
        "reward": {"model": "other", "data": "sample", "learning_rate": 1e-3},
        "ppo": {"policy": "sft", "prompts": "data", "reward": "reward", "learning_rate": 1e-3},
    },
}
MILLION_135, TINY = 134_515_008, 98_880
TINY_REWARD = 2 * 98_560 + 4 * (320 + 64)
"""Bytes: matrices in bfloat16; norms and the score head in float32."""


@pytest.fixture(autouse=True)
def processor_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the same memory on every processor."""
    monkeypatch.setattr("align.models.compute_types.read_speed", lambda: ProductSpeed(2.0, 1.0))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def publish(store: Store, node: Node, config: dict[str, Any]) -> None:
    """A finished artifact with nothing in it but a model's config."""
    folder = store.folder(node.stage.kind, node.key)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    put_record(folder, key=node.key, stage=node.name, kind=node.stage.kind, makes=node.makes)


def of(pipeline: Pipeline, store: Store) -> Estimate:
    estimate = estimate_memory(pipeline, store)
    assert list(estimate) == ["sft", "reward", "ppo"]
    assert isinstance(estimate["ppo"], Estimate), estimate
    return estimate["ppo"]


def test_policy_and_reward_model_each_have_the_model_that_they_started_from(store: Store) -> None:
    actual = of(Pipeline(RAW), store)
    assert actual.parameters == MILLION_135
    assert {choice.memory.reward for choice in actual.choices} == {TINY_REWARD}
    assert [choice.settings for choice in actual.choices if choice.chosen] == [{"tuning": "full", "critic": "reward"}]


def test_a_finished_stage_s_own_config_comes_first(store: Store, tiny_model: Path) -> None:
    pipeline = Pipeline(RAW)
    publish(store, pipeline.nodes["sft"], json.loads((tiny_model / "config.json").read_text()))
    assert of(pipeline, store).parameters == TINY


def test_stages_that_trl_trains_are_counted_too(store: Store) -> None:
    estimate = estimate_memory(Pipeline(RAW).set("stages.sft.tuning={method: qlora}"), store)
    sft, reward = estimate["sft"], estimate["reward"]
    assert isinstance(sft, Estimate) and isinstance(reward, Estimate)
    assert [choice.settings["tuning"] for choice in sft.choices] == ["qlora r16", "full", "lora r16"]
    four, full, lora = (choice.memory for choice in sft.choices)
    assert (sft.parameters, reward.parameters) == (MILLION_135, TINY)
    assert four.weights < 0.4 * lora.weights and full.optimizer > 20 * lora.optimizer


def test_an_ensemble_is_counted_whole(store: Store) -> None:
    raw = Pipeline(RAW).set("stages.ppo.reward", ["reward", "reward"])
    assert {choice.memory.reward for choice in of(raw, store).choices} == {2 * TINY_REWARD}


def test_runtime_changes_the_engine_s_part(store: Store) -> None:
    vllm = of(Pipeline(RAW).set("runtime.engine={name: vllm, cpu_kv_cache_gb: 2}"), store)
    assert {choice.memory.kv_cache for choice in vllm.choices} == {2 * 2**30}
    assert {choice.memory.released for choice in vllm.choices} == {"nothing"}
    assert {choice.memory.released for choice in of(Pipeline(RAW), store).choices} == {"cache"}


def test_a_stage_s_own_runtime_counts(store: Store) -> None:
    everywhere = of(Pipeline(RAW).set("runtime.device=cuda"), store)
    own = of(Pipeline(RAW).set("runtime.stages={ppo: {device: cuda}}"), store)
    assert own == everywhere != of(Pipeline(RAW), store)


def test_what_is_not_here_is_not_guessed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pipeline = Pipeline(RAW).set(stages__other__source="some/model", stages__other__revision="0" * 40)
    estimate = estimate_memory(pipeline, store)
    assert (
        isinstance(estimate["ppo"], str) and "the config.json of 'some/model' is not on this machine" in estimate["ppo"]
    )


def test_a_stage_of_ones_own_is_known_once_it_is_finished(store: Store, tiny_model: Path) -> None:
    pipeline = Pipeline(RAW | {"stages": {**RAW["stages"], "other": {"stage": "tests.support.toy:POLICY"}}})
    reason = "the model that stage 'other' makes is known once it is finished"
    estimate = estimate_memory(pipeline, store)
    assert (estimate["reward"], estimate["ppo"]) == (reason, reason)
    publish(store, pipeline.nodes["other"], json.loads((tiny_model / "config.json").read_text()))
    assert of(pipeline, store).parameters == MILLION_135
