"""What a checkpoint that plays the user of episodes costs in memory."""

from __future__ import annotations

from typing import Any

from align.capacity.estimators import rl
from align.config.runtime import Runtime
from align.config.simulated_user import USER_INPUT
from align.config.stages.grpo import GrpoConfig
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
    return rl.estimate(config, models, runtime)


def test_its_weights_and_its_cache_are_counted() -> None:
    alone, together = (estimated(user).choices[0].memory for user in (None, {"model": "sft"}))
    # 142 weights of two bytes; a key and a value of three numbers in two layers for 16 conversations of 200 tokens.
    assert together.reward - alone.reward == 2 * 142
    assert together.kv_cache - alone.kv_cache == 2 * 2 * 3 * 2 * 16 * (100 + 60 + 40)
    assert together.engine == alone.engine


def test_it_is_sampled_by_transformers_whatever_samples_the_policy() -> None:
    alone, together = (estimated(user, name="vllm").choices[0].memory for user in (None, {"model": "sft"}))
    assert together.reward - alone.reward == 2 * 142
    assert together.kv_cache - alone.kv_cache == 2 * 2 * 3 * 2 * 16 * 200


def test_a_server_costs_nothing_here_and_a_note_says_so() -> None:
    served = estimated({"endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m"}})
    assert served.choices[0].memory == estimated(None).choices[0].memory
    assert any("m at http://127.0.0.1:9/v1, which plays the user, is not counted." in note for note in served.notes)
    assert any(
        "sft, which plays the user, is counted with the reward models" in note
        for note in estimated({"model": "sft"}).notes
    )
