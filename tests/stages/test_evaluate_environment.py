"""The stage ``evaluate`` with an environment: episodes of several systems, through a kill, on the page and in files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.config.runtime import EngineConfig, Runtime
from align.config.stages.evaluate import EvaluateConfig
from align.data.rows import user, write_rows
from align.environments.episode_run import PromptedTurns
from align.environments.turn_template import TurnTemplate
from align.environments.user_models import CheckpointUser
from align.evaluation.plan import make_plan
from align.evaluation.statistics import mean_interval
from align.evaluation.tasks.environment import pass_at
from align.inference.engine import open_engine
from align.inference.sessions import LockstepSession
from align.models.loading import load_tokenizer
from align.pipeline.context import StageContext
from align.report.scorecard.rollouts import SampleFile
from align.report.scorecard.samples import page_samples
from align.stages import evaluate
from align.store.artifacts import Artifact, Kind
from tests.support.environments.buttons import FORMAT, make_presser
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.refusals import Refused

ENVIRONMENT: dict[str, Any] = {
    "class": "tests.support.environments.buttons:SavedButtons",
    "tool_format": FORMAT,
    "max_turns": 3,
    "max_tokens": 60,
    "turn_max_tokens": 8,
}
ROWS, SAMPLES = 4, 4


class Killed(BaseException):
    """The end of a process, which nothing catches."""


@pytest.fixture(scope="module")
def presser(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_presser(tiny_model, tmp_path_factory.mktemp("presser"))


@pytest.fixture
def make_context(presser: Path, tiny_model: Path, tmp_path: Path) -> Callable[..., StageContext]:
    """``make_context(environment fields, task=…, **stage fields)`` returns the context of a stage of two systems.

    ``sft`` presses buttons; ``model`` has the same tokenizer and has learned nothing.
    """
    for stage in ("model", "sft"):
        shutil.copytree(presser, tmp_path / stage / "model")
    shutil.copy(tiny_model / "model.safetensors", tmp_path / "model" / "model" / "model.safetensors")
    data = Artifact("data", Kind.PROMPTS, tmp_path / "data", {"key": "data"})
    data.path.mkdir()
    rows = [{"id": f"r{i}", "source": "buttons", "checks": "", "prompt": [user("go")]} for i in range(ROWS)]
    write_rows(data.split("test"), rows)
    policies = [
        Artifact("model", Kind.MODEL, tmp_path / "model", {"key": "model"}),
        Artifact("sft", Kind.POLICY, tmp_path / "sft", {"key": "sft"}),
    ]

    def make(environment: dict[str, Any] | None = None, task: Any = (), **fields: Any) -> StageContext:
        block = {
            "task": "environment", "rows": "data", "environment": ENVIRONMENT | (environment or {}),
            "samples": SAMPLES, "temperature": 1.0,
        } | dict(task)  # fmt: skip
        config = EvaluateConfig(
            policies=["model", "sft"], reference="sft", rows=["data"], precision="float32", bootstrap=200,
            **{"tasks": {"buttons": block}, "max_context": 128} | fields,
        )  # fmt: skip
        for name in ("out", "checkpoints"):
            (tmp_path / name).mkdir(exist_ok=True)
        return StageContext(
            name="evaluate",
            config=config,
            inputs={"policies": policies, "reference": policies[1], "rows": [data]},
            seed=3,
            runtime=Runtime(device="cpu", engine=EngineConfig(name="transformers")),
            output=tmp_path / "out",
            checkpoints=tmp_path / "checkpoints",
            events=tmp_path / "events.jsonl",
        )

    return make


def read_card(context: StageContext) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((context.output / "scorecard.json").read_text())
    return card


def test_systems_play_and_are_compared(make_context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def count(*values: Any, **options: Any) -> Any:
        opened.append(values)
        return open_engine(*values, **options)

    monkeypatch.setattr("align.inference.engine.open_engine", count)
    context = make_context(baselines={"again": {"of": "sft", "sample_seed": 1}}, gates={"sft/buttons.success": ">= 0"})
    metrics = evaluate.run(context)
    assert len(opened) == 1  # the weights are switched
    events = [json.loads(line) for line in (context.events or Path()).read_text().splitlines()]
    totals = {event["total"] for event in events if event["event"] == "progress" and event["unit"] == "responses"}
    assert totals == {3 * ROWS * SAMPLES}
    card = read_card(context)
    names = ["success", "pass_at_2", "pass_at_4", "score", "turns", "calls", "tool_errors", "failure_rate"]
    assert list(card["metrics"]) == [f"buttons.{name}" for name in names]
    assert card["primary"] == "buttons.success" and card["policies"] == ["model", "sft", "again"]
    assert card["gates"][0]["passed"] and not metrics["failed_gates"]
    samples = list(SampleFile(context.output / "samples.jsonl"))
    assert [sample["id"] for sample in samples] == [f"r{i}" for i in range(ROWS)]
    estimates = card["estimates"]
    for system in card["policies"]:
        episodes = [sample["responses"][system] for sample in samples]
        assert {len(per_row) for per_row in episodes} == {SAMPLES}
        flat = [episode for per_row in episodes for episode in per_row]
        scores = [episode["scores"]["score"] for episode in flat]
        assert estimates[system]["buttons.score"]["value"] == pytest.approx(sum(scores) / len(scores))
        successes = [sum(episode["scores"]["score"] >= 1 for episode in per_row) for per_row in episodes]
        assert estimates[system]["buttons.success"]["value"] == pytest.approx(sum(successes) / len(flat))
        # A row counts once, whatever its samples: its interval resamples rows.
        passed = [pass_at(2, SAMPLES, count) for count in successes]
        expected = mean_interval(passed, resamples=context.config.bootstrap, seed=context.seed).as_dict()
        assert estimates[system]["buttons.pass_at_2"] == pytest.approx(expected)
        calls = sum(len(episode["calls"]) for episode in flat) / len(flat)
        assert estimates[system]["buttons.calls"]["value"] == pytest.approx(calls)
        low, high = (estimates[system]["buttons.success"][side] for side in ("low", "high"))
        assert 0 <= low <= estimates[system]["buttons.success"]["value"] <= high <= 1
    assert estimates["model"]["buttons.calls"]["value"] == 0 < estimates["sft"]["buttons.calls"]["value"]
    compared = {(row["policy"], row["against"]) for row in card["differences"] if row["metric"] == "buttons.success"}
    assert compared == {("sft", "model"), ("again", "sft"), ("again", "model")}
    # The same weights under other seeds play other episodes.
    assert not card["copies"] and samples[0]["responses"]["again"] != samples[0]["responses"]["sft"]
    assert card["tasks"]["buttons"]["notes"]["sft"]["episodes"] == ROWS * SAMPLES
    lines = [json.loads(line) for line in (context.output / "items.jsonl").read_text().splitlines()]
    assert [len(line["values"]["sft"]["pass_at_2"]) for line in lines] == [1] * ROWS
    assert metrics["tokens"] == sum(
        episode["tokens"] for sample in samples for per_row in sample["responses"].values() for episode in per_row
    )


def test_the_page_shows_turns_with_what_tools_said(make_context: Any) -> None:
    context = make_context()
    evaluate.run(context)
    page = page_samples(list(SampleFile(context.output / "samples.jsonl")), read_card(context))
    assert page["tasks"]["buttons"] == {
        "title": page["tasks"]["buttons"]["title"],
        "metric": "success rate",
        "key": "success",
    }
    answers = [answer for item in page["items"] for answer in item["answers"]["sft"]]
    assert {item["prompt"][0]["text"] for item in page["items"]} == {"go"}
    pressing = next(answer for answer in answers if answer["turns"][0]["text"] == "!a" and len(answer["turns"]) > 1)
    assert pressing["turns"][0]["prompt"] == "go" and pressing["turns"][1]["prompt"] == "A"
    assert pressing["scores"]["calls"] >= 1


def test_greedy_play_repeats_itself_and_is_no_measure_of_noise(make_context: Any) -> None:
    context = make_context(
        task={"samples": 1, "temperature": 0.0}, baselines={"again": {"of": "sft", "sample_seed": 1}}
    )
    evaluate.run(context)
    assert read_card(context)["copies"] == {"again": ["buttons"]}


def test_a_killed_stage_plays_on_and_calls_no_tool_twice(
    make_context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_context()
    evaluate.run(plain)
    expected = {name: (plain.output / name).read_text() for name in ("samples.jsonl", "items.jsonl")}
    shutil.rmtree(plain.checkpoints)

    log = tmp_path / "presses"
    context = make_context({"arguments": {"log": str(log)}})
    poll, turns = LockstepSession.poll, []

    def counted(session: LockstepSession, timeout: float | None = None) -> Any:
        # Between the rounds of both systems, when some turns and calls are over and others are not.
        if kills and len(turns) == kills[0]:
            raise Killed(kills.pop(0))
        turns.append(session.pending)
        return poll(session, timeout)

    monkeypatch.setattr(LockstepSession, "poll", counted)
    kills = [1, 2, 3]
    for _ in list(kills):
        with pytest.raises(Killed):
            evaluate.run(context)
    evaluate.run(context)
    samples = list(SampleFile(context.output / "samples.jsonl"))
    presses = [call for sample in samples for episode in sample["responses"]["sft"] for call in episode["calls"]]
    presses = [call for call in presses if not call["error"]]
    assert len(log.read_text().splitlines()) == len(presses) > 0
    played = [
        len(episode["turns"]) for sample in samples for system in sample["responses"].values() for episode in system
    ]
    assert sum(turns) == sum(played)  # no turn was sampled twice
    for name, text in expected.items():
        assert without_seconds((context.output / name).read_text()) == without_seconds(text)
    assert not list((context.checkpoints / "episodes").iterdir())

    # A later attempt takes all of it from the cache.
    monkeypatch.setattr(LockstepSession, "poll", lambda *values: pytest.fail("a turn was sampled"))
    card = read_card(context)
    evaluate.run(context)
    assert read_card(context) == card


def without_seconds(text: str) -> list[Any]:
    """Return the lines of a file without the time that calls took."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        for episodes in line.get("responses", {}).values():
            for call in (call for episode in episodes for call in episode["calls"]):
                del call["seconds"]
    return lines


def test_environments_that_fail_are_counted_and_leave_no_score(make_context: Any) -> None:
    context = make_context({"class": "tests.support.environments.buttons:Fragile"})
    evaluate.run(context)
    card = read_card(context)
    estimates = card["estimates"]["sft"]
    failed = card["tasks"]["buttons"]["notes"]["sft"]["failed"]
    assert 0 < failed < ROWS * SAMPLES
    assert estimates["buttons.failure_rate"]["value"] == pytest.approx(failed / (ROWS * SAMPLES))
    samples = list(SampleFile(context.output / "samples.jsonl"))
    for episode in (episode for sample in samples for episode in sample["responses"]["sft"]):
        assert ("score" in episode["scores"]) == (episode["stop"] != "failed")
        assert ("the machine fell over" in episode["failure"]) == (episode["stop"] == "failed")
        assert episode["scores"]["success"] in (0, 1)
    assert f"buttons: {failed} of 16 episodes of sft failed, and count as no success" in context.events.read_text()


def test_prompts_that_leave_no_room_are_counted(make_context: Any) -> None:
    context = make_context(max_context=65)
    evaluate.run(context)
    assert read_card(context)["estimates"]["sft"]["buttons.failure_rate"]["value"] == 1
    text = context.events.read_text()
    assert "sft: 16 prompts of buttons leave no room for its environment.max_tokens 60 in 65 tokens" in text


def test_a_prompted_system_sees_its_own_message_first(make_context: Any, presser: Path) -> None:
    context = make_context(baselines={"told": {"of": "sft", "system": "press a"}})
    system = make_plan(context).systems[2]
    tokenizer = load_tokenizer(presser)
    turns = PromptedTurns(
        TurnTemplate(tokenizer, [{"type": "function", "function": {"name": "a"}}], "sft"), system.conversation
    )
    text = tokenizer.decode(turns.prompt([user("go")]))
    assert text.endswith("spress a<|im_end|><|im_start|>ugo<|im_end|><|im_start|>a")
    assert turns.eos == tokenizer.eos_token_id
    evaluate.run(context)
    card = read_card(context)
    assert card["estimates"]["told"] != card["estimates"]["sft"]


@pytest.mark.parametrize(
    ("environment", "fields"),
    [
        ({"class": "tests.support.environments.buttons:Nothing"}, {}),
        ({"tool_format": "auto"}, {}),
        ({"max_tokens": 128}, {}),
        ({}, {"gates": {"buttons.sucess": ">= 0"}}),
    ],
)
def test_wrong_environments_are_refused_before_loading(
    refused: Refused, make_context: Any, environment: dict[str, Any], fields: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.inference.engine.open_engine", lambda *values, **more: pytest.fail("it was opened"))
    refused(lambda: evaluate.run(make_context(environment, **fields)))


def test_a_template_without_tools_is_refused(
    refused: Refused, make_context: Any, tiny_model: Path, tmp_path: Path
) -> None:
    context = make_context()
    shutil.rmtree(tmp_path / "model" / "model")
    shutil.copytree(tiny_model, tmp_path / "model" / "model")
    refused(evaluate.run, context)


def test_a_misspelled_part_ends_the_stage_after_the_first_system(refused: Refused, make_context: Any) -> None:
    refused(lambda: evaluate.run(make_context(task={"success": "right"})))


def test_rows_of_a_stage_without_a_test_split_are_refused(refused: Refused, make_context: Any) -> None:
    context = make_context()
    write_rows(context.inputs["rows"][0].split("test"), [])
    refused(evaluate.run, context)


def test_rows_name_one_of_the_stages_own(refused: Refused) -> None:
    task = {"task": "environment", "rows": "date", "environment": ENVIRONMENT}
    refused(EvaluateConfig, policies=["sft"], reference="sft", rows=["data"], tasks={"buttons": task})
    renamed = EvaluateConfig.rename_stages(
        {"rows": ["data"], "tasks": {"buttons": task, "arc": {"shots": 2}}}, str.upper
    )
    assert renamed["rows"] == ["data"]  # an input, which the loop renames itself
    assert renamed["tasks"]["buttons"]["rows"] == "DATE" and renamed["tasks"]["arc"] == {"shots": 2}


def test_best_of_n_plays_no_episodes(make_context: Any, tiny_reward: Path) -> None:
    context = make_context(baselines={"best": {"of": "sft", "best_of": 2}}, reward="reward")
    reward = Artifact("reward", Kind.REWARD, tiny_reward.parent, {"key": "reward"})
    context = replace(context, inputs=context.inputs | {"reward": reward})
    evaluate.run(context)
    card = read_card(context)
    assert "buttons.success" in card["estimates"]["sft"] and "buttons.success" not in card["estimates"]["best"]


USER = {"model": "sft", "prompt": "ab", "stop": "!b", "max_tokens": 8}


def with_user(context: StageContext) -> StageContext:
    """The stage with the checkpoint ``sft`` among its users."""
    return replace(context, inputs=context.inputs | {"users": [context.inputs["policies"][1]]})


def test_a_checkpoint_plays_the_user_of_every_system(make_context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    close = CheckpointUser.close
    monkeypatch.setattr(CheckpointUser, "close", lambda user: closed.append(user) or close(user))
    context = with_user(make_context({"user": USER}, users=["sft"]))
    evaluate.run(context)
    estimates = read_card(context)["estimates"]
    assert estimates["sft"]["buttons.turns"]["value"] > 1
    samples = list(SampleFile(context.output / "samples.jsonl"))
    talks = [
        episode["messages"] for sample in samples for system in ("model", "sft")
        for episode in sample["responses"][system]
    ]  # fmt: skip
    users = [sum(message["role"] == "user" for message in messages) for messages in talks]
    assert max(users) > 1
    # Its weights leave the memory with the last episode of a system.
    assert len(closed) == 2 and all(user._engine is None for user in closed)

    # Another checkpoint of the same name plays other episodes, and the same one none.
    monkeypatch.setattr(LockstepSession, "poll", lambda *values: pytest.fail("a turn was sampled"))
    evaluate.run(context)
    changed = Artifact("sft", Kind.POLICY, context.inputs["users"][0].path, {"key": "another"})
    with pytest.raises(pytest.fail.Exception, match="a turn was sampled"):
        evaluate.run(replace(context, inputs=context.inputs | {"users": [changed]}))


def test_user_prompt_with_a_missing_column_is_refused(refused: Refused, make_context: Any) -> None:
    context = with_user(make_context({"user": USER | {"prompt": "You want {goal}."}}, users=["sft"]))
    refused(make_plan, context)


def test_a_server_that_does_not_answer_yet_is_told_of(
    refused: Refused, make_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = {"prompt": "ab", "endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m"}}
    context = make_context({"user": user})
    make_plan(context)
    text = context.events.read_text()
    assert (
        "tasks.buttons.environment.user.endpoint: nothing answers at http://127.0.0.1:9/v1 yet" in text
        and "plays the user of episodes: start it now" in text
    )
    refused(evaluate.run, context)


def test_the_use_of_a_server_is_noted(make_context: Any) -> None:
    server = FakeChat(lambda body: completion("go on"))
    try:
        endpoint = {"url": server.url, "model": "good-model", "price_input": 1.0, "price_output": 1.0}
        context = make_context({"user": {"prompt": "ab", "endpoint": endpoint}})
        evaluate.run(context)
    finally:
        server.stop()
    text = context.events.read_text()
    assert f"tasks.buttons: the user's server has answered {len(server.bodies)} requests, with" in text
    assert "of answers, for " in text


def test_outage_of_user_server_ends_the_stage_uncached(
    refused: Refused, make_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.inference.endpoint_client.FIRST_WAIT", 0.01)
    server = FakeChat(lambda body: completion("go on") if len(server.bodies) < 4 else (503, "busy"))
    try:
        endpoint = {"url": server.url, "model": "good-model", "retries": 1, "patience": 0}
        context = make_context({"user": {"prompt": "ab", "endpoint": endpoint}})
        refused(evaluate.run, context)
        server.reply = lambda body: completion("go on")
        evaluate.run(context)
    finally:
        server.stop()
    assert all(system["buttons.failure_rate"]["value"] == 0 for system in read_card(context)["estimates"].values())
