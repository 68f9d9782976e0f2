"""Stage synthesize with an ``environment:``: rows of whole episodes, by a checkpoint and by an endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.config.environment import USER_INPUT
from align.config.stages.sft import SftConfig
from align.data.rows import assistant, read_rows, user, write_rows
from align.environments.chat_episodes import ChatSession
from align.extensions.synthesis.config import SynthesizeConfig
from align.extensions.synthesis.run import synthesize
from align.inference import endpoint_client
from align.models.loading import load_tokenizer
from align.stages import sft
from align.store.artifacts import Artifact, Kind
from align.training.rows import MASKED, encode_supervised
from tests.support.environments.buttons import FORMAT, make_presser
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.refusals import Refused
from tests.support.stages.synthesis_harness import endpoint_of, make_artifact, make_context, make_rows, read_ledger
from tests.support.training.harness import context as stage_context

BUTTONS = "tests.support.environments.buttons"
ENVIRONMENT: dict[str, Any] = {
    "class": f"{BUTTONS}:Buttons",
    "tool_format": FORMAT,
    "max_turns": 3,
    "max_tokens": 60,
    "turn_max_tokens": 8,
}
CHECKPOINT: dict[str, Any] = {"model": "sft", "prompts": "data", "environment": ENVIRONMENT, "precision": "float32"}


@pytest.fixture(scope="module")
def presser(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_presser(tiny_model, tmp_path_factory.mktemp("presser"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.01)


# ---- a checkpoint ----


def test_sft_on_synthesized_rows_skips_results_of_tools(presser: Path, tmp_path: Path) -> None:
    context = make_context(tmp_path, presser, task={"type": "responses", "n": 3}, **CHECKPOINT)
    metrics = synthesize(context)
    rows = read_rows(context.output / "train.parquet")
    assert metrics["train_rows"] == len(rows) > 0 and metrics["turns"] > 1 and metrics["tokens"] > 0
    called = [row for row in rows if len(row["completion"]) > 1]
    assert called
    for row in called:
        assert row["prompt"] == [user("go")] and row["completion_finished"]
        assert [message["role"] for message in row["completion"][:2]] == ["assistant", "tool"]
        assert [tool["function"]["name"] for tool in json.loads(row["tools"])] == ["a", "b"]
    tokenizer = load_tokenizer(presser)
    encoded = encode_supervised(tokenizer, rows, 200)
    assert len(encoded.rows) == len(rows) and not encoded.counts
    for encoded_row, row in zip(encoded.rows, rows, strict=True):
        text = tokenizer.decode([label for label in encoded_row["labels"] if label != MASKED])
        assert "A" not in text and "B" not in text
        trained = [m for m in row["completion"] if m["role"] == "assistant" and m.get("train") is not False]
        assert text.count("<|im_end|>") == len(trained)
    ledger = read_ledger(context)
    assert set(ledger["answers"]["dropped"]) <= {
        "cut off at max_tokens", "cut off at max_turns", "empty answer", "same as another answer"
    }  # fmt: skip


def test_sft_trains_on_the_rows_as_they_are(presser: Path, tmp_path: Path) -> None:
    made = make_context(tmp_path / "made", presser, task={"type": "responses", "n": 3}, **CHECKPOINT)
    synthesize(made)
    data = Artifact("made", Kind.INSTRUCTIONS, made.output, {"key": "made"})
    fields = {"learning_rate": 1e-3, "max_steps": 1, "batch_size": 4, "max_length": 128, "tuning": {"method": "full"}}
    context = stage_context(tmp_path, SftConfig(model="model", data="made", **fields), presser, data)
    metrics = sft.run(context)
    assert metrics["rows"] == len(read_rows(made.output / "train.parquet"))
    findings = json.loads((context.output / "findings.json").read_text())["findings"]
    assert not [finding for finding in findings if finding["severity"] == "error"]


def test_the_best_episode_is_that_with_the_highest_score(presser: Path, tmp_path: Path) -> None:
    task = {"type": "best_of", "n": 4, "cut_off": "keep"}
    context = make_context(tmp_path, presser, task=task, **CHECKPOINT)
    synthesize(context)
    best = {row["id"]: row["score"] for row in read_rows(context.output / "train.parquet")}
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert best
    for line in lines:
        if line["id"] in best:
            assert best[line["id"]] == max(score for score in line["scores"] if score is not None)


def test_pairs_of_episodes(presser: Path, tmp_path: Path) -> None:
    context = make_context(tmp_path, presser, task={"type": "pairs", "n": 4}, **CHECKPOINT)
    synthesize(context)
    pairs = read_rows(context.output / "train.parquet")
    assert pairs and any(len(pair["chosen"]) > 1 for pair in pairs)
    assert all(pair["chosen_score"] > pair["rejected_score"] and pair["tools"] for pair in pairs)


def test_episodes_that_leave_no_room_for_a_prompt_are_refused(refused: Refused, presser: Path, tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"max_tokens": 100_000}
    context = make_context(tmp_path, presser, task={"type": "responses"}, **CHECKPOINT | {"environment": environment})
    refused(synthesize, context)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": {"type": "instructions"}},
        {"judge": {}, "judge_model": "sft", "task": {"type": "pairs"}},
        {"score": "gold", "reward": "rm", "task": {"type": "best_of"}},
        {"max_tokens": 61},
        {"model": None, "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m", "extra": {"tools": []}}},
    ],
)
def test_wrong_configs_are_refused(refused: Refused, changes: dict[str, Any]) -> None:
    refused(SynthesizeConfig, **{"task": {"type": "responses"}, **CHECKPOINT, **changes})


def test_environment_scores_and_is_part_of_the_key() -> None:
    config = SynthesizeConfig(task={"type": "best_of"}, **CHECKPOINT)
    changed = SynthesizeConfig(task={"type": "best_of"}, **CHECKPOINT | {"environment": ENVIRONMENT | {"max_turns": 2}})
    assert config.max_tokens == 60
    assert config.identities(Path())["environment"] != changed.identities(Path())["environment"]


# ---- an endpoint ----


def call(name: str, arguments: str = "{}", id: str = "call-1") -> dict[str, Any]:
    """A chat completion that calls a tool."""
    reply = completion(None, finish_reason="tool_calls", usage={"prompt_tokens": 10, "completion_tokens": 3})
    reply["choices"][0]["message"]["tool_calls"] = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    ]
    return reply


def press_and_stop(body: dict[str, Any]) -> dict[str, Any]:
    """Presses a button, then says what it read; which button follows from the seed."""
    last = body["messages"][-1]
    if last["role"] == "tool":
        return completion(f"It says {last['content']}.")
    return call("ab"[body["seed"] % 2])


@pytest.fixture
def fake() -> Iterator[FakeChat]:
    server = FakeChat(press_and_stop)
    yield server
    server.stop()


def endpoint_fields(fake: FakeChat, **environment: Any) -> dict[str, Any]:
    return {"endpoint": endpoint_of(fake), "prompts": "data", "environment": ENVIRONMENT | environment}


def test_an_endpoint_plays_with_tools(fake: FakeChat, tmp_path: Path) -> None:
    context = make_context(
        tmp_path, task={"type": "responses", "n": 2}, system="Be brief.", train=3, test=1, **endpoint_fields(fake)
    )
    metrics = synthesize(context)
    first = fake.bodies[0]
    assert [tool["function"]["name"] for tool in first["tools"]] == ["a", "b"]
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, user("go")]
    second = next(body for body in fake.bodies if len(body["messages"]) == 4)
    called = second["messages"][2]
    assert called["tool_calls"][0]["function"]["arguments"] == "{}" and called["tool_calls"][0]["id"] == "call-1"
    assert second["messages"][3]["tool_call_id"] == "call-1" and second["messages"][3]["content"] in ("A", "B")
    rows = read_rows(context.output / "train.parquet")
    for row in rows:
        assert row["prompt"] == [user("go")]
        assert [message["role"] for message in row["completion"]] == ["assistant", "tool", "assistant"]
        assert row["completion"][2]["content"] == f"It says {row['completion'][1]['content']}."
        assert row["tools"]
    assert metrics["turns"] == 2 and metrics["calls"] == 1
    assert len(fake.bodies) == 2 * 2 * 4 == metrics["asked_in_this_attempt"]
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert all(episode["turns"][0]["text"] == "" for line in lines for episode in line["episodes"])


def test_an_endpoint_speaks_with_a_simulated_user(fake: FakeChat, tmp_path: Path) -> None:
    """The user's server is another one, which sees no call and no result."""
    buyer = FakeChat(lambda body: completion("That is all. BYE" if len(body["messages"]) > 5 else "And then?"))
    try:
        said = {"endpoint": endpoint_of(buyer), "prompt": "You buy.", "stop": "BYE"}
        fields = endpoint_fields(fake, max_turns=6, user=said)
        context = make_context(tmp_path, task={"type": "responses"}, train=2, test=1, **fields)
        metrics = synthesize(context)
    finally:
        buyer.stop()
    assert metrics["user"]["requests"] == len(buyer.bodies) > 3
    for body in buyer.bodies[1:]:
        assert body["messages"][0] == {"role": "system", "content": "You buy."} and "tools" not in body
        assert all(message["role"] in ("system", "user", "assistant") for message in body["messages"])
        assert not any("tool_calls" in message for message in body["messages"])
    for row in read_rows(context.output / "train.parquet"):
        # The words by which it ends the conversation answer nothing that is learned.
        assert [message["content"] for message in row["completion"] if message["role"] == "user"] == ["And then?"]
        assert row["completion"][-1]["role"] == "assistant"


@pytest.mark.parametrize(("cache", "shared"), [(True, "store/user"), (False, None), ("answers", "answers/user")])
def test_answers_of_the_user_are_shared_where_the_cache_says(
    fake: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool | str, shared: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    buyer = FakeChat(lambda body: completion("That is all. BYE"))
    try:
        fields = endpoint_fields(fake, user={"endpoint": endpoint_of(buyer), "prompt": "You buy.", "stop": "BYE"})
        context = make_context(tmp_path, task={"type": "responses"}, train=2, test=1, cache=cache, **fields)
        synthesize(replace(context, cache=tmp_path / "store"))
    finally:
        buyer.stop()
    folders = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("*/user/answers-1.jsonl")}
    assert folders - {"checkpoints/user"} == ({shared} if shared else set())


def test_checkpoint_with_an_endpoint_user_has_the_stage_threads(
    fake: FakeChat, presser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtimes: list[Any] = []
    monkeypatch.setattr("align.models.compute.processes.use_threads", runtimes.append)
    fields = endpoint_fields(fake, user={"model": "sft", "prompt": "You buy.", "max_tokens": 8})
    task = {"type": "responses", "cut_off": "keep"}
    context = make_context(tmp_path, task=task, train=2, test=1, **fields)
    speaker = make_artifact(tmp_path, "speaker", Kind.POLICY, presser)
    synthesize(replace(context, inputs=context.inputs | {USER_INPUT: speaker}))
    assert runtimes == [context.runtime]


def test_outage_of_user_server_ends_the_stage_uncached(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    def say(body: dict[str, Any]) -> dict[str, Any]:
        return completion("That is all. BYE" if len(body["messages"]) > 5 else "And then?")

    buyer = FakeChat(lambda body: say(body) if len(buyer.bodies) < 3 else (503, "busy"))
    try:
        said = {"endpoint": endpoint_of(buyer, retries=1, patience=0), "prompt": "You buy.", "stop": "BYE"}
        fields = endpoint_fields(fake, max_turns=6, user=said)
        context = make_context(tmp_path, task={"type": "responses"}, train=2, test=1, **fields)
        refused(synthesize, context)
        buyer.reply = say
        synthesize(context)
    finally:
        buyer.stop()
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert not any(episode["stop"] == "failed" for line in lines for episode in line["episodes"])


def test_rows_without_a_column_of_the_user_prompt_are_refused(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    buyer = FakeChat(lambda body: completion("And then?"))
    try:
        said = {"endpoint": endpoint_of(buyer), "prompt": "You want {goal}."}
        context = make_context(
            tmp_path, task={"type": "responses"}, train=2, test=1, **endpoint_fields(fake, user=said)
        )
        path = tmp_path / "prompts" / "train.parquet"
        write_rows(path, [row | {"goal": "a lamp"} for row in read_rows(path)])  # test has none
        refused(synthesize, context)
    finally:
        buyer.stop()
    assert not fake.bodies and not buyer.bodies


def test_server_that_speaks_first_opens_a_row_once(fake: FakeChat, tmp_path: Path) -> None:
    buyer = FakeChat(lambda body: completion("So be it. BYE" if len(body["messages"]) > 2 else f"{body['seed']}?"))
    try:
        said = {"endpoint": endpoint_of(buyer), "prompt": "You buy.", "stop": "BYE", "opens": True}
        fields = endpoint_fields(fake, max_turns=6, user=said)
        context = make_context(tmp_path, task={"type": "best_of", "n": 3}, train=2, test=1, **fields)
        synthesize(context)
    finally:
        buyer.stop()
    openings = [body for body in buyer.bodies[1:] if len(body["messages"]) == 2]
    assert len(openings) == 3
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        assert len({episode["messages"][0]["content"] for episode in line["episodes"]}) == 1
    assert "begin differently" not in (context.output / "dropped.jsonl").read_text()


def test_user_reads_no_malformed_call_and_no_reply_to_it(fake: FakeChat, tmp_path: Path) -> None:
    def stutter(body: dict[str, Any]) -> dict[str, Any]:
        told = [message for message in body["messages"] if message["content"].startswith("Error: A tool call")]
        return completion("Which lamp?") if told else call("a", "{not json")

    fake.reply = stutter
    buyer = FakeChat(lambda body: completion("That is all. BYE"))
    try:
        said = {"endpoint": endpoint_of(buyer), "prompt": "You buy.", "stop": "BYE"}
        fields = endpoint_fields(fake, max_turns=6, user=said)
        synthesize(make_context(tmp_path, task={"type": "responses"}, train=2, test=1, **fields))
    finally:
        buyer.stop()
    assert len(buyer.bodies) > 1
    for body in buyer.bodies[1:]:
        system, greeting, *talk = body["messages"]
        assert (system["role"], greeting["role"]) == ("system", "user")
        assert talk == [assistant("go"), user("Which lamp?")]


def test_an_endpoint_plays_a_game_without_tools(fake: FakeChat, tmp_path: Path) -> None:
    def count_up(body: dict[str, Any]) -> dict[str, Any]:
        return completion(str(sum(message["role"] == "assistant" for message in body["messages"]) + 1))

    fake.reply = count_up
    environment = {"class": "tests.support.environments.classes:Game", "max_turns": 4, "max_tokens": 100}
    fields = endpoint_fields(fake) | {"environment": environment}
    context = make_context(tmp_path, task={"type": "responses"}, train=2, test=1, **fields)
    for split in ("train", "test"):
        path = tmp_path / "prompts" / f"{split}.parquet"
        write_rows(path, [row | {"goal": 2} for row in make_rows(2, split)])
    synthesize(context)
    rows = read_rows(context.output / "train.parquet")
    assert len(rows) == 2
    for row in rows:
        assert row["prompt"][0]["content"].startswith("Say train") and "tools" not in row
        assert row["completion"] == [assistant("1"), user("Not 1."), assistant("2")]
    assert all("tools" not in body for body in fake.bodies)


def test_requests_are_cached_and_results_journaled(fake: FakeChat, tmp_path: Path) -> None:
    log = tmp_path / "presses.log"
    fields = endpoint_fields(fake, **{"class": f"{BUTTONS}:SavedButtons", "arguments": {"log": str(log)}})
    task = {"type": "pairs", "n": 3}
    first = synthesize(make_context(tmp_path, task=task, **fields))
    presses, bodies = log.read_text(), len(fake.bodies)
    rows = read_rows(tmp_path / "output" / "train.parquet")
    # The next attempt of a stage that was killed at its very end.
    again = synthesize(make_context(tmp_path, task=task, **fields))
    assert log.read_text() == presses and len(fake.bodies) == bodies
    assert again["usage"] == first["usage"] and again["asked_in_this_attempt"] == 0
    assert read_rows(tmp_path / "output" / "train.parquet") == rows


def test_killed_between_two_requests_it_goes_on_to_the_same_rows(
    fake: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = [tmp_path / "whole.log", tmp_path / "parts.log"]
    whole, parts = (
        endpoint_fields(fake, **{"class": f"{BUTTONS}:SavedButtons", "arguments": {"log": str(log)}}) for log in logs
    )
    task = {"type": "responses", "n": 2}
    synthesize(make_context(tmp_path / "whole", task=task, **whole))
    asked = len(fake.bodies)
    poll, rounds = ChatSession.poll, []

    def dies_second(self: ChatSession, timeout: float | None = None) -> Any:
        rounds.append(self.pending)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return poll(self, timeout)

    monkeypatch.setattr(ChatSession, "poll", dies_second)
    with pytest.raises(KeyboardInterrupt):
        synthesize(make_context(tmp_path / "parts", task=task, **parts))
    monkeypatch.setattr(ChatSession, "poll", poll)
    synthesize(make_context(tmp_path / "parts", task=task, **parts))
    assert len(fake.bodies) == 2 * asked
    rows = [read_rows(tmp_path / name / "output" / "train.parquet") for name in ("whole", "parts")]
    assert rows[0] == rows[1] and rows[0]
    assert sorted(logs[0].read_text().splitlines()) == sorted(logs[1].read_text().splitlines())


def test_a_malformed_call_is_told_and_not_learned(fake: FakeChat, tmp_path: Path) -> None:
    def stutter(body: dict[str, Any]) -> dict[str, Any]:
        told = [message for message in body["messages"] if message["content"].startswith("Error: A tool call")]
        return completion("sorry") if told else call("a", "{not json")

    fake.reply = stutter
    context = make_context(tmp_path, task={"type": "responses"}, train=2, test=1, **endpoint_fields(fake))
    metrics = synthesize(context)
    assert metrics["malformed_calls"] == 1
    for row in read_rows(context.output / "train.parquet"):
        assert row["completion"][0] == {"role": "assistant", "content": "a({not json)", "train": False}
        assert row["completion"][1]["role"] == "user" and "no valid JSON" in row["completion"][1]["content"]
        assert row["completion"][2]["content"] == "sorry"
    assert all("tool_calls" not in message for body in fake.bodies for message in body["messages"])


def test_the_servers_count_limits_an_episode(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    def long(body: dict[str, Any]) -> dict[str, Any]:
        reply = call("a")
        reply["usage"] = {"prompt_tokens": 20 * len(body["messages"]), "completion_tokens": 7}
        return reply

    fake.reply = long
    fields = endpoint_fields(fake, max_turns=9)
    refused(lambda: synthesize(make_context(tmp_path, task={"type": "responses"}, train=1, test=0, **fields)))
    # 60 tokens: the first turn takes 7. Before the second there are 40 more, then 80.
    assert [body["max_tokens"] for body in fake.bodies] == [8, 8, 8]


def test_a_request_that_fails_drops_its_episode(fake: FakeChat, tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> Any:
        return (400, {"error": {"message": "no"}}) if body["seed"] % 3 == 0 else press_and_stop(body)

    fake.reply = refuse
    context = make_context(tmp_path, task={"type": "responses", "n": 3}, on_error="drop", **endpoint_fields(fake))
    metrics = synthesize(context)
    assert metrics["dropped"]["answers"]["episode failed"] > 0
    assert "episodes failed and are left out; the first in request: " in context.events.read_text()
