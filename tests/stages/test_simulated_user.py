"""The stages that learn from rollouts, with a simulated user: by a checkpoint, and by a server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.config.environment import USER_INPUT
from align.environments.simulated_user import GREETING
from align.environments.user_models import CheckpointUser
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind
from tests.support.environments.buttons import FORMAT, make_presser
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.refusals import Refused
from tests.support.rl.stages import KINDS, make_stage
from tests.support.stored_rollouts import stored_rows

ENVIRONMENT: dict[str, Any] = {
    "class": "tests.support.environments.buttons:Buttons",
    "tool_format": FORMAT,
    "max_turns": 3,
    "max_tokens": 80,
    "turn_max_tokens": 8,
}


@pytest.fixture(scope="module")
def presser(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_presser(tiny_model, tmp_path_factory.mktemp("presser"))


@pytest.fixture
def server() -> Iterator[FakeChat]:
    fake = FakeChat(lambda body: completion("go on"))
    yield fake
    fake.stop()


def make(kind: str, folder: Path, model: Path, user: dict[str, Any], **fields: Any) -> StageContext:
    """A stage of one update, whose user says what ``user`` says; a checkpoint that plays it is ``model``."""
    environment = ENVIRONMENT | {"user": {"prompt": "ab", "max_tokens": 8} | user}
    common = {"score": None, "max_tokens": 80, "updates": 1, "rollout_batch": 16}
    context = make_stage(kind, folder, model, environment=environment, **common | fields)
    speaker = Artifact("sft", Kind.POLICY, folder / "policy", {"key": "sft"})
    return replace(context, inputs=context.inputs | {USER_INPUT: speaker if "model" in user else None})


def rollouts(folder: Path) -> list[dict[str, Any]]:
    return stored_rows(folder / "output" / "rollouts")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_learns_from_conversations_with_a_checkpoint(kind: str, presser: Path, tmp_path: Path) -> None:
    metrics = STAGES[kind].runner()(make(kind, tmp_path, presser, {"model": "sft"}, eval_updates=1))
    assert metrics["turns_last"] > 1 and "user" not in metrics
    roles = [[message["role"] for message in line["messages"]] for line in rollouts(tmp_path)]
    assert any(role.count("user") > 1 for role in roles)
    assert not list((tmp_path / "checkpoints" / "episodes").glob("*.jsonl"))


@pytest.mark.parametrize(("rank", "loads"), [(0, 1), (1, 0)])
def test_checkpoint_user_is_loaded_before_training(
    presser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, loads: int
) -> None:
    """Episodes may be played in a thread. With servers that sample the first process plays all."""
    events: list[str] = []
    monkeypatch.setattr(CheckpointUser, "load", lambda user: events.append("load"))
    monkeypatch.setattr("align.stages.rl._resume_and_train", lambda *values: events.append("train"))
    monkeypatch.setattr("align.stages.rl.playing_processes", lambda runtime: 1)
    monkeypatch.setattr("align.stages.rl._facts", lambda *values: {})
    monkeypatch.setattr("align.stages.rl.rank", lambda: rank)
    STAGES["grpo"].runner()(make("grpo", tmp_path, presser, {"model": "sft"}))
    assert events == ["load"] * loads + ["train"]


def test_a_server_plays_the_user_and_its_use_is_counted(server: FakeChat, presser: Path, tmp_path: Path) -> None:
    endpoint = {"url": server.url, "model": "good-model", "price_input": 1.0, "price_output": 1.0}
    metrics = STAGES["grpo"].runner()(make("grpo", tmp_path, presser, {"endpoint": endpoint, "max_cost": 1.0}))
    usage = metrics["user"]
    assert usage["requests"] == len(server.bodies) > 1 and usage["cost"] == pytest.approx(len(server.bodies) * 12e-6)
    assert server.prompts()[0] == "Reply with the one word: ready"
    for body in server.bodies[1:]:
        roles = [message["role"] for message in body["messages"]]
        assert roles[:3] == ["system", "user", "assistant"] and roles[-1] == "user"
        assert [message["content"] for message in body["messages"][:3]] == ["ab", GREETING, "go"]
    said = [message for line in rollouts(tmp_path) for message in line["messages"] if message["role"] == "user"]
    assert {"role": "user", "content": "go on"} in said


def test_a_server_that_goes_away_loses_no_update(
    server: FakeChat, presser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.inference.endpoint_client.FIRST_WAIT", 0.01)

    def reply(body: dict[str, Any]) -> Any:
        return completion("ready") if len(server.bodies) == 1 else (500, "down")

    server.reply = reply
    endpoint = {"url": server.url, "model": "good-model", "retries": 1, "patience": 0}
    metrics = STAGES["grpo"].runner()(make("grpo", tmp_path, presser, {"endpoint": endpoint}))
    assert metrics["updates"] == 1 and 0 < metrics["failure_rate_last"] <= 1
    failures = {line["failure"] for line in rollouts(tmp_path)} - {""}
    assert failures
    assert all("user: the endpoint" in text and "status 500" in text for text in failures)


@pytest.mark.parametrize(
    "user",
    [
        {"endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m"}},
        {"model": "sft", "prompt": "You want {goal}."},
    ],
)
def test_unusable_user_is_refused_before_the_policy_is_loaded(
    refused: Refused, user: dict[str, Any], presser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.stages.rl.open_engine", lambda *args, **kwargs: pytest.fail("the engine was started"))
    monkeypatch.setattr("align.stages.rl.load_for_tuning", lambda *args: pytest.fail("the policy was loaded"))
    refused(lambda: STAGES["grpo"].runner()(make("grpo", tmp_path, presser, user)))
