"""What ``runtime.rollouts`` takes, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

from align.config.runtime import Runtime
from align.config.runtime.rollouts import RolloutsConfig
from tests.support.refusals import Refused


def test_none_is_named_by_default() -> None:
    assert not Runtime().rollouts.pooled
    assert RolloutsConfig(servers=1).pooled
    assert RolloutsConfig(addresses="http://127.0.0.1:8000/").addresses == ["http://127.0.0.1:8000"]


def test_a_stage_has_servers_of_its_own(refused: Refused) -> None:
    settings: dict[str, Any] = {
        "rollouts": {"servers": 2},
        "stages": {"judge": {"rollouts": {"tensor_parallel": 2, "weights": "nccl"}}},
    }
    rollouts = Runtime.model_validate(settings).for_stage("judge").rollouts
    assert (rollouts.servers, rollouts.tensor_parallel, rollouts.weights) == (2, 2, "nccl")
    settings["stages"]["judge"]["rollouts"] = {"addresses": ["http://h:1"]}
    refused(lambda: Runtime.model_validate(settings).for_stage("judge"))


def test_servers_and_an_engine_of_the_process_do_not_go_together(refused: Refused) -> None:
    refused(Runtime.model_validate, {"engine": {"name": "transformers"}, "rollouts": {"servers": 1}})
    alone = Runtime.model_validate({"rollouts": {"servers": 2}, "threads": 1}).with_transformers()
    assert (alone.rollouts.pooled, alone.engine.name, alone.threads) == (False, "transformers", 1)
    assert Runtime.model_validate(alone.model_dump()) == alone


def test_gpus_are_dealt_behind_the_trainers() -> None:
    two = RolloutsConfig(servers=2, tensor_parallel=2)
    assert [two.gpus_of(number, 8) for number in (0, 1)] == [[1, 2], [3, 4]]
    assert [two.gpus_of(number, 4) for number in (0, 1)] == [[0, 1], [2, 3]]  # none can be left out
    assert RolloutsConfig(servers=1).gpus_of(0, 1) == [0]
    assert [RolloutsConfig(servers=3).gpus_of(number, 2) for number in range(3)] == [[0], [1], [0]]
    assert [two.gpus_of(number, 8, trainers=4) for number in (0, 1)] == [[4, 5], [6, 7]]
    named = RolloutsConfig(servers=2, tensor_parallel=2, gpus=[7, 6, 5, 4])
    assert [named.gpus_of(number, 8) for number in (0, 1)] == [[7, 6], [5, 4]]
