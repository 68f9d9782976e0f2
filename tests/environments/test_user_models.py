"""What a stage gives to the model that plays the user of its episodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.config.vllm_servers import RolloutsConfig
from align.environments.endpoint_user import EndpointUser
from align.environments.user_models import open_stage_user
from align.pipeline.context import StageContext
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.rl.stages import make_stage


@pytest.fixture
def server() -> Iterator[FakeChat]:
    fake = FakeChat(lambda body: completion("ready"))
    yield fake
    fake.stop()


@pytest.fixture
def context(server: FakeChat, tmp_path: Path) -> StageContext:
    """A stage whose user is a server."""
    environment: dict[str, Any] = {
        "class": "tests.support.environments.buttons:Buttons",
        "max_tokens": 80,
        "user": {"prompt": "ab", "endpoint": {"url": server.url, "model": "good-model"}},
    }
    return make_stage("grpo", tmp_path, tmp_path, environment=environment, score=None, max_tokens=80)


@pytest.mark.parametrize(("servers", "processes"), [(0, 4), (2, 1)])
def test_the_budget_is_shared_by_the_processes_that_play(
    context: StageContext, monkeypatch: pytest.MonkeyPatch, servers: int, processes: int
) -> None:
    """With a pool of servers the first process plays all episodes."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    runtime = context.runtime.model_copy(update={"rollouts": RolloutsConfig(servers=servers)})
    user = open_stage_user(replace(context, runtime=runtime))
    assert isinstance(user, EndpointUser) and user._client.processes == processes
