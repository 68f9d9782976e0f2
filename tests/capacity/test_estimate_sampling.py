"""Memory of a checkpoint that plays the user of episodes."""

from __future__ import annotations

from typing import Any

import pytest

from align.capacity import estimate_sampling, estimate_training
from align.capacity.hardware import parse_hardware
from align.capacity.sampling import sampling_way
from align.config.environment import USER_INPUT
from align.config.runtime import Runtime
from align.config.stages.evaluate import EvaluateConfig
from align.config.stages.policy_gradient import GrpoConfig
from align.config.stages.sample import SampleConfig
from align.extensions.synthesis import estimate
from align.extensions.synthesis.config import SynthesizeConfig
from tests.support.capacity.models import TOY

ENVIRONMENT: dict[str, Any] = {"class": "a:B", "max_tokens": 60}


def estimated(user: dict[str, Any] | None, **engine: Any) -> Any:
    environment = ENVIRONMENT | ({} if user is None else {"user": {"prompt": "You.", "max_tokens": 40} | user})
    config = GrpoConfig(
        policy="sft", prompts="data", learning_rate=1e-3, rollout_batch=16, max_prompt_tokens=100,
        environment=environment,
    )  # type: ignore[arg-type]  # fmt: skip
    models = {"policy": [TOY]} | ({USER_INPUT: [TOY]} if user and "model" in user else {})
    runtime = Runtime.model_validate({"device": "cpu", "engine": {"name": "transformers"} | engine})
    return estimate_training.estimate(config, models, runtime)


def test_user_s_weights_and_cache_are_counted() -> None:
    alone, together = (estimated(user).choices[0].memory for user in (None, {"model": "sft"}))
    # 142 weights of two bytes; a key and a value of three numbers in two layers for 16 conversations of 200 tokens.
    assert together.reward - alone.reward == 2 * 142
    assert together.kv_cache - alone.kv_cache == 2 * 2 * 3 * 2 * 16 * (100 + 60 + 40)
    assert together.engine == alone.engine


def test_user_is_sampled_by_transformers() -> None:
    alone, together = (estimated(user, name="vllm").choices[0].memory for user in (None, {"model": "sft"}))
    assert together.reward - alone.reward == 2 * 142
    assert together.kv_cache - alone.kv_cache == 2 * 2 * 3 * 2 * 16 * 200


def test_user_on_a_server_is_not_counted() -> None:
    served = estimated({"endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m"}})
    assert served.choices[0].memory == estimated(None).choices[0].memory
    assert any("m at http://127.0.0.1:9/v1, which plays the user, is not counted." in note for note in served.notes)
    assert any(
        "sft, which plays the user, is counted with the reward models" in note
        for note in estimated({"model": "sft"}).notes
    )


def inference_of(stage: str, with_user: bool) -> Any:
    """Estimate a stage that plays episodes of 60 tokens after prompts of at most 100, with the user ``sft`` or none."""
    user = {"user": {"prompt": "You.", "max_tokens": 40, "model": "sft"}} if with_user else {}
    block = {"environment": ENVIRONMENT | user}
    models = {USER_INPUT: [TOY]} if with_user else {}
    if stage == "sample":
        config = SampleConfig(policy="p", prompts="d", n=2, max_prompt_tokens=100, **block)  # type: ignore[arg-type]
        return estimate_sampling.inference(config, {"policy": [TOY], **models})
    if stage == "synthesize":
        content = {
            "model": "p",
            "prompts": "d",
            "max_prompt_tokens": 100,
            "task": {"type": "responses", "n": 2},
            **block,
        }
        return estimate.inference(SynthesizeConfig(**content), {"model": [TOY], **models})  # type: ignore[arg-type]
    task = {"max_items": 8, "rows": "d", **block}
    lists: Any = {"users": ["sft"]} if with_user else {}
    content = {"policies": ["p"], "reference": "p", "rows": ["d"], "tasks": {"environment": task}, "max_context": 160}
    evaluation = EvaluateConfig(**content, **lists)  # type: ignore[arg-type]
    return estimate_sampling.inference(evaluation, {"policies": [TOY]} | ({"users": [TOY]} if with_user else {}))


@pytest.mark.parametrize("stage", ["sample", "synthesize", "evaluate"])
def test_user_is_counted_in_addition_to_the_engine(stage: str) -> None:
    runtime = Runtime.model_validate({"device": "cpu", "engine": {"name": "transformers"}})
    hardware = parse_hardware("cpu")
    alone, together = (sampling_way(inference_of(stage, with_user), runtime, hardware) for with_user in (False, True))
    assert together.batch == alone.batch > 0
    assert together.parts["user"] == 2 * 142 and "user" not in alone.parts
    per_token = 2 * 2 * 3 * 2  # a key and a value of three numbers in two layers, of two bytes
    assert together.parts["kv_cache"] - alone.parts["kv_cache"] == per_token * alone.batch * (100 + 60 + 40)
    assert any("sft, which plays the user, is counted." in n for n in inference_of(stage, True).notes)
