"""Plans: what a run would do, what changed, and what a stage that continues another says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.capacity.memory import Estimate
from align.capacity.plan import estimate_memory
from align.config.yaml import parse_yaml
from align.models.compute.costs import ProductSpeed
from align.pipeline.pipeline import Node, Pipeline
from align.runner.plan import plan
from align.runner.runner import RunOptions, prepare_run
from align.store.store import Store
from tests.support.records import put_record
from tests.support.refusals import Refused

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
    monkeypatch.setattr("align.models.compute.costs.read_speed", lambda: ProductSpeed(2.0, 1.0))


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


def test_policy_and_reward_use_their_start_model_s_sizes(store: Store) -> None:
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
    assert four.weights < 0.5 * lora.weights and full.optimizer > 20 * lora.optimizer


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


SFT: dict[str, Any] = {"model": "model", "data": "data", "learning_rate": 1e-3, "max_steps": 6, "scheduler": "constant"}
PPO: dict[str, Any] = {"policy": "model", "prompts": "data", "score": "gold", "learning_rate": 1e-5, "updates": 2}
MORE = {"continue_from": "sft", "max_steps": 12}


def pipeline(**stages: dict[str, Any]) -> Pipeline:
    first = {"model": {"source": "tiny"}, "data": {"recipe": "data_recipes/embedded.yaml"}, "sft": dict(SFT)}
    return Pipeline({"name": "run", "seed": 1, "stages": {**first, **stages}})


def finish(store: Store, node: Node, has_state: bool = True, **metrics: Any) -> None:
    """Put a finished artifact of ``node`` into the store, as far as its record goes."""
    folder = store.folder(node.stage.kind, node.key)
    (folder / "state").mkdir(parents=True)
    if has_state:
        (folder / "state" / "state.json").write_text("{}")
    put_record(
        folder,
        key=node.key,
        kind=node.stage.kind,
        stage=node.name,
        makes=str(node.makes),
        pipeline="run",
        config=node.config.model_dump(mode="json"),
        seed=node.seed,
        parts=node.parts,
        metrics=metrics,
    )


def notes(pipe: Pipeline, store: Store, stage: str) -> str:
    return " ".join(next(step.notes for step in plan(pipe, store) if step.node.name == stage))


@pytest.mark.parametrize(
    ("sft", "more", "expected"),
    [
        ({}, {}, "continues 'sft'; equals `max_steps: 12` at once, bit for bit on a CPU"),
        ({"scheduler": "wsd"}, {}, "equals `max_steps: 12` at once"),
        ({"scheduler": "inverse_sqrt"}, {}, "equals `max_steps: 12` at once"),
        ({"scheduler": "cosine"}, {}, "differs from `max_steps: 12` at once: scheduler cosine sets every step's rate"),
        ({"scheduler": "linear"}, {}, "differs from `max_steps: 12` at once: scheduler linear"),
        (
            {},
            {"max_steps": 60},
            "differs from `max_steps: 60` at once: its warm-up took 1 steps, where warmup_ratio 0.05 of 60 steps is 3",
        ),
        ({"warmup_ratio": 0.0}, {"max_steps": 60}, "equals `max_steps: 60` at once"),
        ({}, {"max_rows": 10}, "differs from `max_steps: 12` at once: it has other rows"),
        ({"max_steps": None}, {"epochs": 2}, "may be a longer warm-up"),
    ],
)
def test_a_plan_says_whether_more_steps_equal_all_at_once(
    sft: dict[str, Any], more: dict[str, Any], expected: str, store: Store
) -> None:
    block = {**MORE, **more}
    if sft.get("max_steps", 1) is None:
        block.pop("max_steps")
    assert expected in notes(pipeline(sft={**SFT, **sft}, more=block), store, "more")


def test_a_plan_says_how_large_the_state_is_and_counts_updates(store: Store) -> None:
    pipe = pipeline(ppo=PPO, more={"continue_from": "ppo", "updates": 5})
    finish(store, pipe.nodes["ppo"], updates=2)
    assert notes(pipe, store, "more").startswith("continues 'ppo' (its state: 0.0 MB); equals `updates: 5` at once")


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        ({"engine": {"name": "transformers"}}, "at once, bit for bit on a CPU"),
        ({"engine": {"name": "vllm"}}, "at once, but for vLLM's rounding, which can change a sampled token"),
        ({"rollouts": {"servers": 1}}, "at once, but for vLLM's rounding"),
    ],
)
def test_plan_promises_equal_bits_only_without_vllm(runtime: dict[str, Any], expected: str, store: Store) -> None:
    stages = {"ppo": PPO, "more": {"continue_from": "ppo", "updates": 5}, "sft_more": MORE}
    pipe = Pipeline({**pipeline(**stages).plain, "runtime": runtime})
    assert expected in notes(pipe, store, "more")
    # Training on rows samples nothing, whatever the engine is.
    assert "at once, bit for bit on a CPU" in notes(pipe, store, "sft_more")


def test_suggestion_promises_equal_bits_only_without_vllm(store: Store) -> None:
    finish(store, pipeline(ppo=PPO).nodes["ppo"], updates=2)
    longer = {**pipeline(ppo={**PPO, "updates": 5}).plain, "runtime": {"engine": {"name": "vllm"}}}
    assert "with the same result, but for vLLM's rounding" in notes(Pipeline(longer), store, "ppo")


def test_a_run_with_more_steps_suggests_to_continue(store: Store) -> None:
    finish(store, pipeline().nodes["sft"], steps=6)
    longer = pipeline().set("stages.sft.max_steps=12")
    key = pipeline().nodes["sft"].key[:12]
    suggestion = (
        f"'sft': its first 6 steps are finished (sft/{key}). To train only the others, with the same result, bit for "
        "bit on a CPU: leave max_steps: 6 in stages.sft, add `sft_more: {continue_from: sft, max_steps: 12}` below it, "
        "and name sft_more where sft is read."
    )
    assert notes(longer, store, "sft") == suggestion
    assert suggestion in prepare_run(longer, RunOptions(store)).warnings
    # What it suggests is a pipeline, in which the first stage is finished.
    suggested = pipeline(sft_more={"continue_from": "sft", "max_steps": 12})
    assert [step.action for step in plan(suggested, store)][2:] == ["cached", "run"]


@pytest.mark.parametrize(
    ("change", "metrics", "has_state"),
    [
        ({"max_steps": 5}, {"steps": 6}, True),
        ({"max_steps": 12, "batch_size": 8}, {"steps": 6}, True),
        ({"max_steps": 12}, {"steps": 6}, False),
        ({"max_steps": 12}, {"steps": 6, "stopped_early": True}, True),
    ],
)
def test_nothing_is_suggested_where_nothing_can_be_continued(
    change: dict[str, Any], metrics: dict[str, Any], has_state: bool, store: Store
) -> None:
    finish(store, pipeline().nodes["sft"], has_state, **metrics)
    assert notes(pipeline(sft={**SFT, **change}), store, "sft") == ""


def test_continuing_is_suggested_for_other_settings(store: Store) -> None:
    finish(store, pipeline(ppo=PPO).nodes["ppo"], updates=2)
    strict = pipeline(ppo={**PPO, "kl_coef": 0.5, "updates": 4})
    suggestion = notes(strict, store, "ppo")
    block = "{continue_from: {stage: ppo, at: last, change: {updates: 4, kl_coef: 0.5}}}"
    assert "'ppo' is finished with other settings, and this run begins anew." in suggestion
    assert f"leave stages.ppo as it was and add `ppo_more: {block}` below it." in suggestion
    assert suggestion in prepare_run(strict, RunOptions(store)).warnings
    suggested = pipeline(ppo=PPO, more=parse_yaml(block, "suggestion"))
    assert [step.action for step in plan(suggested, store)][3:] == ["cached", "run"]
    # Other batches and another seed are another run.
    assert notes(pipeline(ppo={**PPO, "rollout_batch": 32, "kl_coef": 0.5}), store, "ppo") == ""
    assert notes(pipeline(ppo={**PPO, "seed": 9, "kl_coef": 0.5}), store, "ppo") == ""


def test_another_schedule_is_suggested_with_its_difference(store: Store) -> None:
    cosine = {**SFT, "scheduler": "cosine"}
    finish(store, pipeline(sft=cosine).nodes["sft"], steps=6)
    suggestion = notes(pipeline(sft={**cosine, "max_steps": 12, "save_steps": 7}), store, "sft")
    assert "with another result, as scheduler cosine sets every step's rate" in suggestion


def test_missing_state_is_refused_before_the_run(refused: Refused, store: Store) -> None:
    pipe = pipeline(more=MORE)
    finish(store, pipe.nodes["sft"], has_state=False, steps=6)
    refused(lambda: prepare_run(pipe, RunOptions(store)))
    assert "without the trainer's state" in notes(pipe, store, "more")
    assert prepare_run(pipe, RunOptions(store, rebuild=("sft",))).force == {"sft"}


def test_a_stage_that_ended_early_is_not_continued(refused: Refused, store: Store) -> None:
    pipe = pipeline(ppo=PPO, more={"continue_from": "ppo", "updates": 5})
    finish(store, pipe.nodes["ppo"], updates=1, stopped="update 2: the KL is over kl_budget 1")
    refused(lambda: prepare_run(pipe, RunOptions(store)))
    change = {"stage": "ppo", "change": {"kl_budget": 9.0}}
    changed = pipeline(ppo=PPO, more={"continue_from": change, "updates": 5})
    assert prepare_run(changed, RunOptions(store)).wanted[-1].name == "more"
