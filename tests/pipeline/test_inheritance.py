"""``continue_from``: fields taken from the other stage, keys, and errors before anything starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from align import Pipeline
from align.errors import UserError
from align.pipeline.inheritance import with_end
from tests.support.refusals import Refused

SFT = {"model": "model", "data": "data", "learning_rate": 1e-3, "max_steps": 6, "scheduler": "constant", "seed": 5}
PPO = {"policy": "sft", "prompts": "data", "score": "gold", "learning_rate": 1e-5, "updates": 2}


def raw(**stages: dict[str, Any]) -> dict[str, Any]:
    first = {
        "model": {"source": "tiny"},
        "data": {"recipe": "data_recipes/embedded.yaml"},
        "more_data": {"stage": "data", "recipe": "data_recipes/embedded.yaml", "max_rows": 100},
        "sft": copy.deepcopy(SFT),
        "ppo": copy.deepcopy(PPO),
    }
    return {"name": "run", "seed": 1, "stages": {**first, **stages}}


def test_a_continued_stage_has_the_other_s_fields_and_its_own() -> None:
    pipeline = Pipeline(raw(more={"continue_from": "sft", "max_steps": 12}))
    more, sft = pipeline.nodes["more"], pipeline.nodes["sft"]
    assert (more.stage.kind, more.seed, more.config.max_steps) == ("sft", 5, 12)
    assert more.config.model_copy(update={"max_steps": 6, "continue_from": None}) == sft.config
    assert more.parts["inputs"]["continue_from"] == sft.key
    assert Pipeline(pipeline.plain).nodes["more"].key == more.key
    chained = Pipeline(raw(more={"continue_from": "sft", "max_steps": 12}, last={"continue_from": "more", "epochs": 2}))
    assert chained.nodes["last"].config.max_steps == 12 and chained.nodes["last"].config.continue_from == "more"


def test_a_stage_that_continues_none_has_the_key_it_always_had() -> None:
    parts = Pipeline(raw()).nodes["sft"].parts
    assert "continue_from" not in parts["config"] and "continue_from" not in parts["inputs"]


def test_a_stage_that_is_continued_keeps_its_state() -> None:
    settings = {"runtime": {"keep_state": False, "stages": {"ppo": {"keep_state": True}}}}
    pipeline = Pipeline({**raw(more={"continue_from": "sft", "max_steps": 12}), **settings})
    assert {name: pipeline.runtimes[name].keep_state for name in ("sft", "more", "ppo")} == {
        "sft": True,
        "more": False,
        "ppo": True,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"max_steps": 12, "data": "more_data", "save_steps": 3, "eval_rows": 8},
        {"epochs": 2},
        {"data": "more_data"},
        {"max_steps": None},
    ],
)
def test_length_rows_and_observations_may_differ(fields: dict[str, Any]) -> None:
    assert Pipeline(raw(more={"continue_from": "sft", **fields})).nodes["more"].makes == "PolicyCheckpoint"


@pytest.mark.parametrize(
    "block",
    [
        {"continue_from": "sft", "max_steps": 12, "batch_size": 8},
        {"continue_from": "sft", "max_steps": 12, "tuning": {"method": "lora", "rank": 4}},
        {"continue_from": "sft", "max_steps": 12, "seed": 6},
        {"continue_from": "sft", "max_steps": 12, "model": "sft"},
        {"continue_from": "sft"},
        {"continue_from": "sft", "max_steps": 5},
        {"continue_from": "ppo", "updates": 2, "prompts": "more_data"},
        {"continue_from": "ppo", "updates": 3, "kl_coef": 0.1},
        {"continue_from": "stf", "max_steps": 12},
        {"continue_from": "more", "max_steps": 12},
        {"continue_from": "last", "max_steps": 12},
        {"stage": "dpo", "continue_from": "sft", "beta": 0.2},
        {"continue_from": "data", "max_rows": 3},
    ],
)
def test_stage_that_cannot_continue_is_refused(refused: Refused, block: dict[str, Any]) -> None:
    refused(lambda: Pipeline(raw(more=block, last={**SFT, "stage": "sft"})))


def changed(source: str = "ppo", **change: Any) -> dict[str, Any]:
    return {"continue_from": {"stage": source, "at": "last", "change": change}}


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("sft", {"learning_rate": 1e-5, "max_steps": 12, "scheduler": "linear", "weight_decay": 0.1}),
        ("sft", {"max_length": 512, "data": "more_data", "max_steps": 12}),
        ("ppo", {"kl_coef": 0.5, "updates": 4}),
        ("ppo", {"score": [{"function": "gold", "weight": 2.0}], "max_tokens": 32, "temperature": 0.8, "updates": 4}),
        ("ppo", {"prompts": "more_data", "clip_range": 0.1, "critic_learning_rate": 1e-3, "updates": 4}),
    ],
)
def test_settings_change_where_a_stage_continues(source: str, change: dict[str, Any]) -> None:
    pipeline = Pipeline(raw(more=changed(source, **change)))
    more, before = pipeline.nodes["more"], pipeline.nodes[source]
    same = more.config.model_dump(exclude={*change, "continue_from", "critic_learning_rate"})
    assert same == before.config.model_dump(exclude={*change, "continue_from", "critic_learning_rate"})
    assert all(getattr(more.config, name) != getattr(before.config, name) for name in change)
    assert (more.inputs["continue_from"], more.parts["inputs"]["continue_from"]) == (source, before.key)
    # A job on a cluster reads the plain pipeline, in which every field is written out.
    assert Pipeline(pipeline.plain).nodes["more"].key == more.key


def test_empty_change_has_the_key_of_the_short_form() -> None:
    short = Pipeline(raw(more={"continue_from": "sft", "max_steps": 12})).nodes["more"]
    assert Pipeline(raw(more={"continue_from": {"stage": "sft"}, "max_steps": 12})).nodes["more"].key == short.key
    assert Pipeline(raw(more=changed("sft", max_steps=12))).nodes["more"].key == short.key
    other = Pipeline(raw(more=changed("sft", max_steps=12, learning_rate=1e-4))).nodes["more"]
    assert other.key != short.key


@pytest.mark.parametrize(
    "block",
    [
        changed(kl_ceof=0.5),
        changed(gradient_accumulation_steps=4),
        changed(kl_coef=-1),
        {**changed(kl_coef=0.5), "kl_coef": 0.4},
        changed(tuning={"method": "lora", "rank": 4}),
        changed(policy="model"),
        changed(rollout_batch=32),
        changed(seed=7),
        changed(trainer={"adam_beta2": 0.9}),
        changed("sft", batch_size=8),
        changed("sft", ema=0.9, max_steps=12),
        {"continue_from": {"stage": "ppo", "at": 3}, "updates": 4},
        {"continue_from": {"stage": "ppo", "at": 1}, "updates": 1},
        {"continue_from": {"stage": "ppo", "at": 0}},
        changed("poo"),
        {"continue_from": {"stage": "ppo", "at": "first"}},
        {"continue_from": {"stge": "ppo"}},
        {"continue_from": {"stage": "ppo", "change": [1]}},
    ],
)
def test_change_that_is_not_possible_is_refused(refused: Refused, block: dict[str, Any]) -> None:
    refused(lambda: Pipeline(raw(more=block)))


def test_stage_ends_where_another_continues_it() -> None:
    pipeline = Pipeline(raw(more={"continue_from": {"stage": "ppo", "at": 1, "change": {"kl_coef": 0.5}}}))
    ppo, more = pipeline.nodes["ppo"], pipeline.nodes["more"]
    assert (ppo.config.end_after, more.config.end_after, more.config.updates) == (1, None, 2)
    assert with_end(ppo.parts, None) == Pipeline(raw()).nodes["ppo"].parts
    assert more.key != Pipeline(raw(more=changed(kl_coef=0.5))).nodes["more"].key
    assert Pipeline(pipeline.plain).nodes["more"].key == more.key
    # Its own end is no other end.
    at_end = Pipeline(raw(more={"continue_from": {"stage": "ppo", "at": 2}, "updates": 4}))
    assert at_end.nodes["more"].key == Pipeline(raw(more={"continue_from": "ppo", "updates": 4})).nodes["more"].key
    with pytest.raises(UserError, match="'sft' ends after 2, where another stage continues it. A stage has one end"):
        more = {"continue_from": {"stage": "sft", "at": 2}}
        Pipeline(raw(more=more, other={"continue_from": {"stage": "sft", "at": 3}}))


def test_critic_keeps_the_reward_model_that_it_began_with(refused: Refused) -> None:
    reward = {"model": "model", "data": "data", "learning_rate": 1e-4}
    stages = {"reward": reward, "other": {**reward, "stage": "reward", "learning_rate": 2e-4}}
    blocks = raw()["stages"]
    ppo = blocks.pop("ppo")
    for settings, message in (
        ({}, "change: reward cannot change, because the critic began with it"),
        ({"critic": "policy"}, ""),
    ):
        rest = {"ppo": {**ppo, "reward": "reward", **settings}, "more": changed(reward="other", updates=4)}
        pipeline = {"name": "run", "stages": {**blocks, **stages, **rest}}
        if message:
            refused(Pipeline, pipeline)
        else:
            assert Pipeline(pipeline).nodes["more"].inputs["reward"] == "other"


def test_best_checkpoint_and_lisa_fix_rows_and_steps(refused: Refused) -> None:
    chooses = {**SFT, "keep": "best", "eval_steps": 2}
    refused(lambda: Pipeline(raw(sft=chooses, more={"continue_from": "sft", "max_steps": 12, "data": "more_data"})))
    lisa = {**SFT, "tuning": {"method": "full", "lisa": {"layers": 1}}}
    refused(lambda: Pipeline(raw(sft=lisa, more={"continue_from": "sft", "max_steps": 12})))


def test_an_artifact_from_elsewhere_is_not_continued(refused: Refused) -> None:
    refused(
        lambda: Pipeline(
            raw(there={"stage": "artifact", "path": "a"}, more={"continue_from": "there", "max_steps": 12})
        )
    )


def test_a_stage_of_a_loop_is_continued_by_its_last_round() -> None:
    loop = {"rounds": 2, "carry": {"start": {"first": "model", "then": "tuned"}}, "stages": {}}
    loop["stages"]["tuned"] = {**SFT, "stage": "sft", "model": "start"}
    pipeline = Pipeline(raw(loop=loop, more={"stage": "sft", "continue_from": "tuned", "max_steps": 12}))
    more = pipeline.nodes["more"]
    assert (more.inputs["continue_from"], more.inputs["model"]) == ("tuned-2", "tuned-1")
    assert more.seed == pipeline.nodes["tuned-2"].seed == 6


def repeated(more: dict[str, Any], first: str, lengths: dict[str, int]) -> dict[str, Any]:
    """Two rounds of drawing rows and continuing the stage ``first`` on them."""
    drawn = {"stage": "data", "recipe": "data_recipes/embedded.yaml"}
    carry = {"start": {"first": first, "then": "more"}}
    return {
        "loop": {
            "rounds": 2,
            "carry": carry,
            "stages": {"drawn": drawn, "more": more},
            "changes": {2: {"more": lengths}},
        }
    }


@pytest.mark.parametrize(
    ("first", "field", "length"), [("sft", "data", "max_steps"), ("ppo", "prompts", "updates")], ids=["sft", "ppo"]
)
def test_change_in_a_loop_names_stages_of_its_round(first: str, field: str, length: str) -> None:
    more: dict[str, Any] = {
        "stage": first,
        "continue_from": {"stage": "start", "change": {field: "drawn", "learning_rate": 1e-4}},
    }
    more[length] = 12
    nodes = Pipeline(raw(**repeated(more, first, {length: 18}))).nodes
    assert [nodes[f"more-{number}"].inputs[field] for number in (1, 2)] == ["drawn-1", "drawn-2"]
    assert [nodes[f"more-{number}"].inputs["continue_from"] for number in (1, 2)] == [first, "more-1"]
    # Rounds have the seed of the stage that they continue; it decides the order of rows.
    assert {nodes[name].seed for name in (first, "more-1", "more-2")} == {nodes[first].seed}
    assert nodes["drawn-1"].seed != nodes["drawn-2"].seed


def test_stage_without_a_kind_continues_a_loop_s_last_round() -> None:
    block = {"stage": "sft", "model": "start", "data": "drawn", "max_steps": 12, "learning_rate": 1e-4}
    loop = repeated(block, "sft", {})
    last = {"continue_from": {"stage": "more", "change": {"data": "drawn"}}, "max_steps": 20}
    node = Pipeline(raw(**loop, last=last)).nodes["last"]
    assert (node.stage.kind, node.inputs["continue_from"], node.inputs["data"]) == ("sft", "more-2", "drawn-2")
