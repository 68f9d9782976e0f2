"""Stage sample with an ``environment:``, on a tiny model that presses buttons: pairs of whole episodes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.config.environment import USER_INPUT
from align.config.runtime import EngineConfig, Runtime
from align.config.stages.sample import SampleConfig
from align.data.rows import read_rows, user, write_rows
from align.environments import player as episode_player
from align.errors import UserError
from align.models.loading import load_tokenizer
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.rl.rollout_tables import read_episode
from align.stages import sample_episodes
from align.stages.sample import run
from align.store.artifacts import Artifact, Kind
from align.training.rows import encode_pairs
from tests.support.environments.buttons import FORMAT, make_presser
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.refusals import Refused
from tests.support.stored_rollouts import stored_rows
from tests.support.training.harness import context as stage_context

BUTTONS = "tests.support.environments.buttons"
ENVIRONMENT: dict[str, Any] = {
    "class": f"{BUTTONS}:Buttons",
    "tool_format": FORMAT,
    "max_turns": 3,
    "max_tokens": 60,
    "turn_max_tokens": 8,
}


@pytest.fixture(scope="module")
def presser(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_presser(tiny_model, tmp_path_factory.mktemp("presser"))


def make_context(folder: Path, model: Path, train: int = 4, test: int = 2, **config: Any) -> StageContext:
    for name in ("output", "checkpoints", "prompts", "policy"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        rows = [
            {"id": f"{split}{i}", "source": "t", "prompt": [user(f"Press {i}")], "checks": "", "gold": i}
            for i in range(count)
        ]
        write_rows(folder / "prompts" / f"{split}.parquet", rows)
    if not (folder / "policy" / "model").exists():
        (folder / "policy" / "model").symlink_to(model)
    fields = {"policy": "sft", "prompts": "data", "n": 3, "environment": ENVIRONMENT, "precision": "float32"} | config
    return StageContext(
        name="sample",
        config=SampleConfig(**fields),
        inputs={
            "policy": Artifact("sft", Kind.POLICY, folder / "policy", {"key": "sft"}),
            "prompts": Artifact("data", Kind.PROMPTS, folder / "prompts", {}),
            "reward": None,
        },
        seed=11,
        runtime=Runtime(engine=EngineConfig(name="transformers")),
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        events=folder / "events.jsonl",
    )


def read_lines(context: StageContext) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]


def test_pairs_are_whole_episodes_that_dpo_can_train_on(presser: Path, tmp_path: Path) -> None:
    context = make_context(tmp_path, presser)
    metrics = run(context)
    lines = read_lines(context)
    assert [line["split"] for line in lines] == ["train"] * 4 + ["test"] * 2
    for line in lines:
        # How the environment begins, which is not the row's own prompt.
        assert line["prompt"] == [user("go")]
        assert len(line["episodes"]) == len(line["scores"]) == 3
        own = [row for row in stored_rows(context.output / "rollouts") if row["prompt_id"] == line["id"]]
        assert [row["messages"] for row in own] == [episode["messages"] for episode in line["episodes"]]
        assert [row["score"] for row in own] == pytest.approx(line["scores"])
        assert all(row["response_mask"].count(True) == sum(read_episode(row).mask) > 0 for row in own)
    pairs = read_rows(context.output / "train.parquet")
    assert metrics["train_pairs"] == len(pairs) > 0 and metrics["train_turns"] > 1 and metrics["train_calls"] > 0
    calls = 0
    for pair in pairs:
        assert pair["prompt"] == [user("go")] and pair["chosen_score"] > pair["rejected_score"]
        assert [tool["function"]["name"] for tool in json.loads(pair["tools"])] == ["a", "b"]
        assert pair["gold"] == int(pair["id"].removeprefix("train").split("-")[0])
        for side in ("chosen", "rejected"):
            roles = [message["role"] for message in pair[side]]
            assert roles[0] == roles[-1] == "assistant" and set(roles) <= {"assistant", "tool"}
            for message in pair[side]:
                for call in json.loads(message.get("tool_calls", "[]")):
                    assert call["function"]["arguments"] == {} and call["id"]
                    calls += 1
    assert calls > 0
    encoded = encode_pairs(load_tokenizer(presser), pairs, 200)
    assert len(encoded.rows) == len(pairs) and not encoded.counts
    # Learned is the end of every turn of the assistant, and no result of a tool.
    tokenizer = load_tokenizer(presser)
    for row, pair in zip(encoded.rows, pairs, strict=True):
        for side in ("chosen", "rejected"):
            learned = [id for id, mask in zip(row[f"{side}_ids"], row[f"{side}_mask"], strict=True) if mask]
            text = tokenizer.decode(learned)
            turns = [message for message in pair[side] if message["role"] == "assistant"]
            assert text.count("<|im_end|>") == len(turns) - (not pair[f"{side}_finished"])
            assert "A" not in text and "B" not in text


def test_a_checkpoint_plays_the_user(presser: Path, tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"max_tokens": 80, "user": {"model": "sft", "prompt": "ab", "max_tokens": 8}}
    context = make_context(tmp_path, presser, environment=environment)
    inputs = context.inputs | {USER_INPUT: context.inputs["policy"]}
    metrics = run(replace(context, inputs=inputs))
    assert metrics["train_turns"] > 1 and "user" not in metrics
    sides = [pair[side] for pair in read_rows(context.output / "train.parquet") for side in ("chosen", "rejected")]
    assert any(message["role"] == "user" for side in sides for message in side)


def test_outage_of_user_server_ends_the_stage_uncached(
    refused: Refused, presser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.inference.endpoint_client.FIRST_WAIT", 0.01)
    server = FakeChat(lambda body: completion("go on") if len(server.bodies) < 4 else (503, "busy"))
    try:
        said = {"endpoint": {"url": server.url, "model": "good-model", "retries": 1, "patience": 0}, "prompt": "ab"}
        context = make_context(tmp_path, presser, environment=ENVIRONMENT | {"max_tokens": 80, "user": said})
        refused(run, context)
        server.reply = lambda body: completion("go on")
        run(context)
    finally:
        server.stop()
    assert not any(episode["stop"] == "failed" for line in read_lines(context) for episode in line["episodes"])


def test_rows_without_a_column_of_the_user_prompt_are_refused(
    refused: Refused, presser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "align.stages.sample_episodes.open_engine", lambda *args, **kwargs: pytest.fail("an engine was started")
    )
    environment = ENVIRONMENT | {"user": {"model": "sft", "prompt": "You want {goal}.", "max_tokens": 8}}
    context = make_context(tmp_path, presser, environment=environment)
    path = tmp_path / "prompts" / "train.parquet"
    write_rows(path, [row | {"goal": "a lamp"} for row in read_rows(path)])  # test has none
    inputs = context.inputs | {USER_INPUT: context.inputs["policy"]}
    refused(lambda: run(replace(context, inputs=inputs)))


def test_user_who_speaks_first_begins_episodes_of_a_row_alike(presser: Path, tmp_path: Path) -> None:
    speaker = {"model": "sft", "prompt": "ab", "max_tokens": 8, "opens": True}
    context = make_context(tmp_path, presser, environment=ENVIRONMENT | {"max_tokens": 80, "user": speaker})
    metrics = run(replace(context, inputs=context.inputs | {USER_INPUT: context.inputs["policy"]}))
    assert metrics["train_different_beginnings"] == metrics["test_different_beginnings"] == 0
    openings = {json.dumps(pair["prompt"]) for pair in read_rows(context.output / "train.parquet")}
    assert len(openings) > 1, "rows begin differently"


@pytest.mark.parametrize("kind", ["dpo", "kto", "simpo", "reward"])
def test_stages_train_on_the_pairs_as_they_are(kind: str, presser: Path, tmp_path: Path) -> None:
    sampled = make_context(tmp_path / "sampled", presser)
    run(sampled)
    data = Artifact("sample", Kind.PREFERENCES, sampled.output, {"key": "sample"})
    fields: dict[str, Any] = {"learning_rate": 1e-3, "max_steps": 1, "batch_size": 2, "max_length": 128}
    source = "model" if kind == "reward" else "policy"
    config = STAGES[kind].config_class()(**{source: "model"}, data="sample", tuning={"method": "full"}, **fields)
    context = stage_context(tmp_path, config, presser, data, source)
    metrics = STAGES[kind].runner()(context)
    assert metrics["steps"] == 1
    findings = json.loads((context.output / "findings.json").read_text())["findings"]
    assert "pair-prompts-differ" not in [finding["name"] for finding in findings]


def test_a_score_adds_to_that_of_the_environment(presser: Path, tmp_path: Path) -> None:
    context = make_context(tmp_path, presser, score=[{"function": "tests.support.rewards:length"}])
    run(context)
    for line in read_lines(context):
        for score, length, episode in zip(line["scores"], line["parts"]["length"], line["episodes"], strict=True):
            presses = [call["name"] for call in episode["calls"] if not call["error"]]
            points = presses.count("a") - 0.5 * presses.count("b")
            assert score == pytest.approx(points + length)


def test_failed_episodes_make_no_pair_and_are_counted(presser: Path, tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"class": f"{BUTTONS}:Fragile"}
    context = make_context(tmp_path, presser, train=8, n=6, environment=environment)
    metrics = run(context)
    lines = [line for line in read_lines(context) if line["split"] == "train"]
    failed = [
        (line["id"], place)
        for line in lines
        for place, episode in enumerate(line["episodes"])
        if episode["stop"] == "failed"
    ]
    assert metrics["train_failed_episodes"] == len(failed) > 0
    assert all(line["scores"][place] is None for line in lines for id, place in failed if id == line["id"])
    for pair in read_rows(context.output / "train.parquet"):
        id, *places = pair["id"].rsplit("-", 2)
        assert not {(id, int(place)) for place in places} & set(failed)
    assert "episodes failed and are left out; the first in call: the machine fell over" in context.events.read_text()


def test_episodes_that_begin_differently_are_not_compared(presser: Path, tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"class": f"{BUTTONS}:Greeting"}
    with pytest.raises(UserError, match="no train pair came out of 4 prompts"):
        run(make_context(tmp_path, presser, environment=environment))
    assert (
        "4 of 4 train prompts make no pair, because their episodes begin differently"
        in (tmp_path / "events.jsonl").read_text()
    )


def test_killed_in_an_episode_it_goes_on_to_the_same_result(
    presser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = [tmp_path / "whole.log", tmp_path / "parts.log"]
    environments = [ENVIRONMENT | {"class": f"{BUTTONS}:SavedButtons", "arguments": {"log": str(log)}} for log in logs]
    whole = make_context(tmp_path / "whole", presser, environment=environments[0])
    run(whole)
    parts = make_context(tmp_path / "parts", presser, environment=environments[1])
    take_turns, rounds = episode_player.EpisodePlayer._take_turns, []

    def dies_third(self: Any, responses: Any) -> None:
        # Between two rounds, when no call is under way: that would be made again.
        rounds.append(len(responses))
        if len(rounds) == 3:
            raise KeyboardInterrupt
        take_turns(self, responses)

    monkeypatch.setattr(episode_player.EpisodePlayer, "_take_turns", dies_third)
    with pytest.raises(KeyboardInterrupt):
        run(parts)
    monkeypatch.setattr(episode_player.EpisodePlayer, "_take_turns", take_turns)
    run(parts)
    assert read_rows(parts.output / "train.parquet") == read_rows(whole.output / "train.parquet")
    # No button was pressed twice.
    pressed = [sorted(log.read_text().splitlines()) for log in logs]
    assert pressed[0] == pressed[1] != []
    engines: list[Any] = []
    monkeypatch.setattr(sample_episodes, "open_engine", lambda *args, **kwargs: engines.append(args))
    again = make_context(tmp_path / "parts", presser, environment=environments[1])
    run(again)
    assert not engines, "a stage that was complete plays nothing"


def test_unfit_environment_is_refused_before_the_engine_starts(
    refused: Refused, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(sample_episodes, "open_engine", start)
    refused(lambda: run(make_context(tmp_path, tiny_model)))


def test_environment_score_is_used_unless_another_is_set() -> None:
    fields = {"policy": "sft", "prompts": "data", "environment": ENVIRONMENT}
    config = SampleConfig(**fields)
    assert config.score is None and "score" not in config.model_fields_set
    assert config.max_tokens == 60 and "max_tokens" not in config.model_fields_set
    assert SampleConfig(**fields, score="gold").score == "gold"
    # As a stage's process reads it.
    assert SampleConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 64},
        {"score": "gold", "reward": "rm"},
    ],
)
def test_wrong_configs_are_refused(refused: Refused, changes: dict[str, Any]) -> None:
    refused(SampleConfig, policy="sft", prompts="data", environment=ENVIRONMENT, **changes)


def test_the_environment_is_part_of_the_key() -> None:
    fields = {"policy": "sft", "prompts": "data"}
    config = SampleConfig(**fields, environment=ENVIRONMENT)
    changed = SampleConfig(**fields, environment=ENVIRONMENT | {"class": f"{BUTTONS}:Generous"})
    assert config.identities(Path())["environment"] != changed.identities(Path())["environment"]
    assert "environment" not in SampleConfig(**fields).identities(Path())
