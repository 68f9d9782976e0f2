"""The stages grpo, rloo, online_dpo and rejection: their configs, their runs on a two-layer model, and killed runs."""

from __future__ import annotations

import json
import operator
import re
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from align.capacity import estimate_training
from align.config.runtime import Runtime
from align.data.rows import read_rows, write_rows
from align.pipeline.registry import STAGES
from align.stages import rl as stage
from align.stages.update_reports import ReportUpdates
from align.store.artifacts import Artifact, Kind
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.judges import by_word
from tests.support.stages.rollout_contexts import BASE, context_maker
from tests.support.stored_rollouts import stored_rows
from tests.support.training.harness import events

SAMPLE = {"policy": "sft", "prompts": "data"}
SCORED = BASE | {"score": "gsm8k_answer"}
KINDS = ["grpo", "rloo", "online_dpo", "rejection"]


def config_of(kind, **inputs):
    return STAGES[kind].config_class()(**inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "inputs",
    [
        BASE,
        SCORED | {"tuning": {"method": "lora", "dropout": 0.1}},
        SCORED | {"tuning": {"method": "prompt"}},
        SCORED | {"tuning": {"method": "full", "lisa": {"layers": 1}}},
        SCORED | {"trainer": {"updates": 3}},
        SCORED | {"trainer": {"adam_bta2": 0.9}},
        SCORED | {"trainer": {"save_steps": 3}},
        SCORED | {"keep": "best"},
    ],
)
def test_wrong_configs_are_refused_with_a_remedy(refused, kind, inputs):
    refused(config_of, kind, **inputs)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("grpo", {"loss": "dapoo"}),
        ("grpo", {"samples_per_prompt": 1}),
        ("grpo", {"resample_rounds": 2}),
        ("grpo", {"overlong_buffer": 65}),
        ("grpo", {"kl_estimator": "k1"}),
        ("grpo", {"loss": "cispo", "clip_range": 0.1}),
        ("grpo", {"kl_controller": "adaptive", "kl_horizon": 1}),
        ("rloo", {"kl_estimator": "k3"}),
        ("rloo", {"rollout_batch": 10}),
        ("online_dpo", {"micro_batch_size": 1}),
        ("online_dpo", {"samples_per_prompt": 8, "num_mini_batches": 5}),
        ("online_dpo", {"loss": "ipo", "label_smoothing": 0.1}),
        ("rejection", {"best": 9}),
        ("rejection", {"samples_per_prompt": 1}),
        ("rejection", {"threshold": [0.1, 0.2, 0.3, 0.4]}),
        ("rejection", {"num_mini_batches": 5}),
    ],
)
def test_what_a_method_cannot_do_is_refused(refused, kind, inputs):
    refused(config_of, kind, **SCORED, **inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_reads_back_from_its_own_json(kind):
    """As the stage's process gets it: with every default written out."""
    config = config_of(kind, **SCORED)
    assert type(config).model_validate(json.loads(config.model_dump_json())) == config


def test_stage_without_critic_needs_no_memory_for_its_head():
    from align.models.compute.model_types import architecture_of
    from align.models.model_plan import EMBEDDED_SIZES

    sizes = architecture_of(EMBEDDED_SIZES)
    both = []
    for kind, inputs in (("ppo", {"critic": "head"}), ("grpo", {"samples_per_prompt": 4})):
        both.append(estimate_training.estimate(config_of(kind, **SCORED, **inputs), {"policy": [sizes]}, Runtime()))
    (ppo,), (grpo,) = ([choice for choice in actual.choices if choice.chosen] for actual in both)
    assert grpo.memory.critic == 0 < ppo.memory.critic
    ppo_total, grpo_total = (replace(choice.memory, in_heap=False).total for choice in (ppo, grpo))
    assert ppo_total - grpo_total == ppo.memory.critic
    assert set(grpo.settings) == {"tuning"}


@pytest.fixture
def make_context(tmp_path, tiny_model, tiny_reward):
    """A context whose inputs are the tiny models and eight prompts."""
    return context_maker(tmp_path, tiny_model, tiny_reward)


LORA = {"method": "lora", "rank": 4, "alpha": 8}


class Killed(BaseException):
    """As abrupt as a signal: nothing catches it."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_stage_goes_on_to_the_same_weights(make_context, monkeypatch, kind):
    """On a reward model and a verifiable function alike."""
    settings = {
        "reward": "reward",
        "reward_floor": None,
        "score": "gsm8k_answer",
        "gold": "gsm8k_answer",
        "tuning": LORA,
    }
    settings |= {"updates": 2, "scheduler": "linear"}
    uninterrupted, killed = make_context(kind, "whole", **settings), make_context(kind, "killed", **settings)
    run = STAGES[kind].runner()
    expected = run(uninterrupted)
    points = events(uninterrupted, "metrics")
    assert [point["step"] for point in points] == [1, 2]
    assert {"score", "score_reward", "score_function", "gold", "kl", "entropy"} <= points[0].keys()
    assert expected["episodes"] == 32 and expected["gold_last"] == 0.0 and expected["parity_gap_last"] < 1e-4
    assert (uninterrupted.output / "adapter" / "adapter_config.json").is_file()
    rows = stored_rows(uninterrupted.output / "rollouts")
    assert len(rows) == 32 and {row["update"] for row in rows} == {1, 2}
    assert all(row["token_kl"] for row in rows if row["learned"])

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 1:  # the second update is sampled and measured
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ReportUpdates, "on_step_begin", kill)
        with pytest.raises(Killed):
            run(killed)
    assert not (killed.output / "model").exists()
    result = run(killed)
    weights = [load_file(context.output / "model" / "model.safetensors") for context in (uninterrupted, killed)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    for name in ("score_first", "score_last", "kl_last", "episodes", "tokens"):
        assert result[name] == expected[name]


LENGTH, VOWELS = "tests.support.rewards:length", "tests.support.rewards:vowels"


def test_killed_stage_with_rewards_repeats_no_request(make_context, monkeypatch):
    fake = FakeChat(lambda body: completion(f"[[{1 + len(body['messages'][-1]['content']) % 10}]]"))
    score = [
        {"function": LENGTH, "weight": -0.5, "arguments": {"limit": 10}},
        {"function": VOWELS, "name": "open"},
        {"function": "tests.support.rewards:watched", "weight": 0.0},
        {"judge": {"endpoint": {"url": fake.url, "model": "good-model"}}, "weight": 2.0},
        {"reward": "reward", "name": "rm"},
    ]
    run = STAGES["grpo"].runner()
    contexts = []
    monkeypatch.setattr("align.pipeline.context.PROGRESS_SECONDS", 0.0)
    for attempt in ("whole", "killed"):
        context = make_context("grpo", attempt, score=score, tuning=LORA, eval_updates=2, eval_prompts=2)
        policy = context.inputs["policy"]
        context.inputs["score.reward"] = [Artifact("reward", Kind.REWARD, policy.path.parent / "reward", {})]
        contexts.append(context)
    whole, killed = contexts
    metrics = run(whole)
    asked = len(fake.bodies)
    assert metrics["judges"]["judge"]["requests"] == asked

    points = events(whole, "metrics")
    names = ("length", "open", "watched", "judge", "rm")
    for point in [point for point in points if "score" in point]:
        parts = [point[f"score_{name}"] for name in names]
        assert point["score"] == pytest.approx(sum(map(operator.mul, (-0.5, 1.0, 0.0, 2.0, 1.0), parts)), abs=1e-4)
        assert all(f"score_{name}_std" in point for name in names)
        assert point["score_open_characters"] == pytest.approx(point["score_watched"])
        assert point["score_judge_unreadable"] == 0.0
    assert any("test_score_judge" in point for point in points)
    phases = " ".join(event["text"] for event in events(whole, "phase"))
    counted = set(re.findall(r"scoring [1-9]\d*/\d+ by '(\w+)'", phases))
    assert counted >= {"open", "watched", "judge"} and "length" not in counted  # it gets a whole batch
    assert {f"score_{name}_last" for name in names} <= metrics.keys()
    row = stored_rows(whole.output / "rollouts")[0]
    assert row["scores"]["open_characters"] == len(row["response"])
    assert ("open_vowels" in row["scores"]) == any(letter in row["response"] for letter in "aeiou")

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ReportUpdates, "on_step_begin", kill)
        with pytest.raises(Killed):
            run(killed)
    resumed = run(killed)
    fake.stop()
    assert len(fake.bodies) == 2 * asked  # the same questions as the uninterrupted run, each once
    assert resumed["judges"] == metrics["judges"]
    weights = [load_file(context.output / "model" / "model.safetensors") for context in (whole, killed)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_checkpoint_judges_the_responses_of_a_policy(make_context):
    judge = {"model": "judge", "max_tokens": 4, "max_unreadable": 0.99}
    score = [{"judge": judge, "weight": 0.5}, {"function": VOWELS}]
    context = make_context("grpo", "checkpoint", score=score, tuning=LORA, updates=1, rollout_batch=8)
    policy = context.inputs["policy"]
    context.inputs["score.judge.model"] = [replace(policy, stage="judge")]
    metrics = STAGES["grpo"].runner()(context)
    # A model with random weights writes no grade, which scores 0.
    assert metrics["judges"]["judge"]["requests"] > 1
    assert metrics["score_judge_last"] == 0.0
    point = next(point for point in events(context, "metrics") if "score" in point)
    assert point["score_judge_unreadable"] == 1.0 and point["score"] == pytest.approx(point["score_vowels"])


def test_prompts_that_are_mostly_too_long_are_refused(refused, make_context, monkeypatch):
    monkeypatch.setattr(stage, "load_for_tuning", lambda *_: pytest.fail("the model was loaded"))
    refused(lambda: STAGES["grpo"].runner()(make_context("grpo", "long", score="gsm8k_answer", max_prompt_tokens=8)))


def test_long_rows_is_in_no_key():
    for kind, inputs in (("grpo", SCORED), ("sft", {"model": "m", "data": "d"}), ("sample", SAMPLE)):
        config = STAGES[kind].config_class()(**inputs, long_rows="skip")
        assert "long_rows" in config.fields_outside_key()


def test_score_of_0_shows_the_reasons_of_the_verifier(make_context):
    context = make_context("grpo", "unread", score=[{"choice": "tests", "name": "letter"}], tuning=LORA)
    # Each row's right answer is the letter Z, which no response of a tiny model states.
    rows = [{**row, "tests": "Z"} for row in read_rows(context.inputs["prompts"].path / "train.parquet")]
    write_rows(context.inputs["prompts"].path / "train.parquet", rows)
    metrics = STAGES["grpo"].runner()(context)
    (line,) = metrics["score_reasons"]
    assert re.match(r"1\d of 16: no_answer.*; `choice` reads a box .* in the prompt$", line)
    (alarm,) = [event["message"] for event in events(context, "warning") if "constant score" in event["message"]]
    assert "`choice` reads a box" in alarm and " of 16: no_answer" in alarm and "Example: " in alarm


def test_rollouts_have_the_reasons_of_a_judge(make_context):
    fake = FakeChat(by_word)
    judge = {"endpoint": {"url": fake.url, "model": "good-model"}}
    score = [{"criteria": ["It has an e", "It has an a"], "judge": judge}]
    context = make_context("grpo", "criteria", score=score, tuning=LORA, score_validation={"floor": 0.0})
    metrics = STAGES["grpo"].runner()(context)
    fake.stop()
    assert metrics["judges"]["criteria"]["requests"] == len(fake.bodies)
    rows = stored_rows(context.output / "rollouts")
    answered = [row for row in rows if not row["scores"]["criteria_no_answer"]]
    assert answered and all(row["explanation"] is None for row in rows if row not in answered)
    assert {row["reasons"]["criteria"] for row in rows if row not in answered} <= {"no_answer"}
    for row in answered:
        verdicts = [letter in row["response"] for letter in "ea"]
        assert [item["satisfied"] for item in row["explanation"]["criteria"]] == verdicts
        assert row["score"] == sum(verdicts) / 2 == row["scores"]["criteria_satisfied"]


@pytest.mark.parametrize(
    "entry",
    [
        {"function": "tests.support.rewards:lenght"},
        {"function": LENGTH, "arguments": {"limt": 1}},
        {"judge": {"endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m"}}},
    ],
)
def test_unusable_reward_ends_the_stage_before_the_engine_starts(refused, make_context, monkeypatch, entry):
    monkeypatch.setattr(stage, "open_engine", lambda *args, **kwargs: pytest.fail("the engine was started"))
    refused(lambda: STAGES["grpo"].runner()(make_context("grpo", "refused", score=[entry])))
