"""What ``runtime.rollouts`` takes, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from align.config.runtime import Runtime
from align.config.runtime.rollouts import RolloutsConfig
from align.errors import UserError


def test_none_is_named_by_default() -> None:
    assert not Runtime().rollouts.pooled
    assert RolloutsConfig(servers=1).pooled
    assert RolloutsConfig(addresses="http://127.0.0.1:8000/").addresses == ["http://127.0.0.1:8000"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"servers": 2, "addresses": ["http://h:1"]}, "give one of them"),
        ({"addresses": ["http://h:1", "http://h:1/"]}, "http://h:1 is listed twice"),
        ({"addresses": ["127.0.0.1:8000"]}, "'127.0.0.1:8000' is not an address of a vLLM server"),
        ({"addresses": ["https://h:1"]}, "is not an address"),
        ({"addresses": ["http://h:1/v1"]}, "is not an address"),
        ({"addresses": ["http://h:1"], "tensor_parallel": 2}, "`addresses` have their own"),
        ({"addresses": ["http://h:1"], "gpus": [0]}, "`addresses` have their own"),
        ({"weights": "nccl"}, "no server is named: write `servers: 2`"),
        ({"weights_folder": "shared"}, "no server is named"),
        ({"tensor_parallel": 2}, "no server is named"),
        ({"servers": 2, "tensor_parallel": 2, "gpus": [1, 2, 3]}, "gpus names 3 GPUs; 2 servers of 2 each need 4"),
        ({"servers": 2, "gpus": [1]}, "gpus names 1 GPUs"),
        ({"servers": 2, "gpus": [0, 0, 1]}, "gpus names a GPU twice"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Runtime.model_validate({"rollouts": settings})


def test_a_stage_has_servers_of_its_own() -> None:
    settings: dict[str, Any] = {
        "rollouts": {"servers": 2},
        "stages": {"judge": {"rollouts": {"tensor_parallel": 2, "weights": "nccl"}}},
    }
    rollouts = Runtime.model_validate(settings).for_stage("judge").rollouts
    assert (rollouts.servers, rollouts.tensor_parallel, rollouts.weights) == (2, 2, "nccl")
    settings["stages"]["judge"]["rollouts"] = {"addresses": ["http://h:1"]}
    with pytest.raises(UserError, match=r"runtime\.stages\.judge: rollouts: servers are started.*give one of them"):
        Runtime.model_validate(settings).for_stage("judge")


@pytest.mark.parametrize(
    ("engine", "block"),
    [
        ({"name": "vllm-server"}, "{rollouts: {servers: 1}}"),
        ({"name": "vllm-server", "address": "http://h:1"}, "{rollouts: {addresses: [http://h:1]}}"),
        ({"address": "http://h:1", "weights": "nccl"}, "{rollouts: {addresses: [http://h:1], weights: nccl}}"),
        ({"name": "vllm-server", "weights_folder": "/x"}, "{rollouts: {servers: 1, weights_folder: /x}}"),
    ],
)
def test_the_old_place_of_one_server_is_refused_with_the_new(engine: dict[str, Any], block: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Runtime.model_validate({"engine": engine})
    assert f"Write `runtime: {block}`, and leave {', '.join(_shown(engine))} out of engine." in str(caught.value)


def _shown(engine: dict[str, Any]) -> list[str]:
    return ["name: vllm-server" if name == "name" else name for name in engine]


def test_servers_and_an_engine_of_the_process_do_not_go_together() -> None:
    with pytest.raises(ValidationError, match=r"engine\.name is transformers.*Leave one of them out"):
        Runtime.model_validate({"engine": {"name": "transformers"}, "rollouts": {"servers": 1}})
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
