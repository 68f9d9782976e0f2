"""Stage synthesize, against a fake server and the tiny model: what is written, counted, cached and paid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.data.rows import read_rows, user, write_rows
from align.extensions.synthesis.run import synthesize
from align.inference import endpoint_client
from align.models.loading import load_tokenizer
from tests.support.inference.fake_chat import FakeChat
from tests.support.refusals import Refused
from tests.support.stages.synthesis_harness import (
    digests,
    endpoint_of,
    make_context,
    make_rows,
    read_ledger,
    talk,
    write_seeds,
)

FILES = ("train.parquet", "test.parquet", "samples.jsonl", "dropped.jsonl", "ledger.json")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.01)


@pytest.fixture
def fake() -> Iterator[FakeChat]:
    server = FakeChat(talk)
    yield server
    server.stop()


def test_instructions(fake: FakeChat, tmp_path: Path) -> None:
    task = {"type": "instructions", "count": 30, "at_once": 2, "test_size": 0.3}
    context = make_context(tmp_path, task=task, endpoint=endpoint_of(fake), seeds=write_seeds(tmp_path))
    metrics = synthesize(context)
    train, test = (read_rows(context.output / f"{split}.parquet") for split in ("train", "test"))
    assert len(train) + len(test) == 30 and test
    assert all(row["prompt"][0]["content"].startswith("Tell me w") and row["similarity"] <= 0.7 for row in train)
    ledger = read_ledger(context)
    assert ledger["candidates"]["out"] == 30 and ledger["requests"]["in"] == len(fake.bodies)
    assert ledger["usage"]["model"]["requests"] == len(fake.bodies) == metrics["asked_in_this_attempt"]
    assert metrics["train_rows"] == len(train)
    assert all((context.output / name).is_file() for name in FILES)


def test_too_few_instructions_are_a_warning(fake: FakeChat, tmp_path: Path) -> None:
    task = {"type": "instructions", "count": 30, "max_requests": 1}
    context = make_context(tmp_path, task=task, endpoint=endpoint_of(fake), prompts="data", train=20)
    assert synthesize(context)["train_rows"] <= 8
    assert "of 30 instructions came out of 1 requests" in context.events.read_text()


def test_responses_keep_splits_and_omit_the_system_message(fake: FakeChat, tmp_path: Path) -> None:
    context = make_context(
        tmp_path, task={"type": "responses", "n": 2}, endpoint=endpoint_of(fake), prompts="data", system="Be brief.",
        max_prompts={"train": 4},
    )  # fmt: skip
    synthesize(context)
    train, test = (read_rows(context.output / f"{split}.parquet") for split in ("train", "test"))
    assert {row["id"].split("-")[0] for row in train} == {"a0", "a1", "a2", "a3"}
    assert {row["id"].split("-")[0] for row in test} == {"b0", "b1", "b2"}
    assert train[0]["prompt"] == [user("Say a 0")]
    assert fake.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train"] * 4 + ["test"] * 3
    assert all(len(line["texts"]) == 2 for line in lines)


def test_best_of_by_a_function(fake: FakeChat, tmp_path: Path) -> None:
    context = make_context(
        tmp_path, task={"type": "best_of", "n": 4}, endpoint=endpoint_of(fake), prompts="data",
        score="tests.support.stages.synthesis_harness:word_score",
    )  # fmt: skip
    synthesize(context)
    lines = {json.loads(line)["id"]: json.loads(line) for line in (context.output / "samples.jsonl").open()}
    rows = read_rows(context.output / "train.parquet")
    assert len(rows) == 6
    for row in rows:
        assert row["score"] == max(lines[row["id"]]["scores"]) == len(row["completion"][0]["content"].split())


def test_pairs_by_a_judge_in_both_orders(fake: FakeChat, tmp_path: Path) -> None:
    judge = {"endpoint": endpoint_of(fake, model="judge-model")}
    context = make_context(
        tmp_path, task={"type": "pairs", "n": 3}, endpoint=endpoint_of(fake), prompts="data", judge=judge
    )
    metrics = synthesize(context)
    for split in ("train", "test"):
        for pair in read_rows(context.output / f"{split}.parquet"):
            assert len(pair["chosen"][0]["content"].split()) > len(pair["rejected"][0]["content"].split())
    assert fake.prompts()[0] == "Reply with the one word: ready", "the judge is tried before anything is generated"
    assert fake.bodies[0]["model"] == "judge-model" and fake.bodies[1]["model"] == "good-model"
    ledger = read_ledger(context)
    judged = sum(count for name, count in ledger["notes"].items() if name.startswith("judge said"))
    assert judged == ledger["usage"]["judge"]["requests"] - 1 <= 9 * 6
    ties = read_rows(context.output / "ties.parquet")
    assert metrics["ties"] == len(ties) == ledger["ties"]
    assert {tie["why"] for tie in ties} <= {"tie", "orders disagree"}
    assert {"train", "test"} >= {tie["split"] for tie in ties}


def test_pairs_by_a_reward_model_from_a_checkpoint(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> None:
    context = make_context(
        tmp_path, tiny_model, tiny_reward, task={"type": "pairs", "n": 3}, model="sft", prompts="data", reward="reward",
        max_tokens=12, precision="float32",
    )  # fmt: skip
    metrics = synthesize(context)
    pairs = read_rows(context.output / "train.parquet")
    assert 0 < len(pairs) <= 6 and metrics["engines"] == ["transformers"]
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    usage = read_ledger(context)["usage"]["model"]
    assert usage["requests"] == 27 and usage["completion_tokens"] <= 27 * 12 and usage["uncounted"] == 0


def test_a_checkpoint_as_judge_takes_the_engine_over(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    context = make_context(
        tmp_path, tiny_model, task={"type": "pairs", "n": 2}, model="sft", prompts="data", judge_model="sft2",
        judge={"max_tokens": 4}, max_tokens=8,
    )  # fmt: skip
    refused(synthesize, context)
    assert read_ledger(context)["usage"]["judge"]["requests"] > 0


def test_thoughts_are_closed_within_their_budget(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "thinker"))
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    tokenizer.save_pretrained(model)
    # Random answers end at max_tokens.
    task = {"type": "responses", "n": 2, "cut_off": "keep"}
    fields: dict[str, Any] = {"task": task, "model": "sft", "prompts": "data", "max_tokens": 24}
    refused(lambda: synthesize(make_context(tmp_path / "refused", model, thinking_budget=13, **fields)))
    closed: dict[int | None, int] = {}
    for budget in (None, 4):
        # Both stages have one folder and so one cache of answers, whose keys have the budget.
        context = make_context(tmp_path / "run", model, thinking_budget=budget, **fields)
        synthesize(context)
        closed[budget] = (context.output / "samples.jsonl").read_text().count("</think>")
    # A random model may end its turn within the budget.
    assert closed[None] == 0 and closed[4] > 10


def test_long_prompts_are_dropped_and_counted(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    context = make_context(
        tmp_path, tiny_model, task={"type": "responses"}, model="sft", prompts="data", max_tokens=4, max_prompt_tokens=3
    )  # fmt: skip
    refused(synthesize, context)
    dropped = [json.loads(line) for line in (context.output / "dropped.jsonl").open()]
    assert "max_prompt_tokens is 3" in dropped[0]["detail"]["error"]


def test_a_model_that_cannot_hold_prompt_and_answer_says_so(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    context = make_context(
        tmp_path, tiny_model, task={"type": "responses"}, model="sft", prompts="data", max_tokens=100_000
    )  # fmt: skip
    refused(synthesize, context)
    assert "with max_tokens 100000 the model's" in (context.output / "dropped.jsonl").read_text()


def test_prices_and_a_budget(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    config = {
        "task": {"type": "responses", "n": 3}, "prompts": "data", "max_tokens": 10,
        "endpoint": endpoint_of(fake, price_input=1.0, price_output=2.0, concurrency=2),
    }  # fmt: skip
    refused(lambda: synthesize(make_context(tmp_path, **config, max_cost=0.0006)))
    first = len(fake.bodies)
    assert 10 < first < 27
    metrics = synthesize(make_context(tmp_path, **config, max_cost=1.0))
    assert len(fake.bodies) == 27
    usage = metrics["usage"]["model"]
    assert usage["cost"] == pytest.approx((usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1e6)
    assert metrics["cost"] == metrics["spent"] == usage["cost"]


def test_second_stage_reads_the_shared_cache(fake: FakeChat, tmp_path: Path) -> None:
    config = {"task": {"type": "responses", "n": 3}, "prompts": "data", "cache": str(tmp_path / "cache")}
    first = make_context(tmp_path / "one", endpoint=endpoint_of(fake), **config)
    synthesize(first)
    second = make_context(tmp_path / "two", endpoint=endpoint_of(fake), **config)
    synthesize(second)
    assert len(fake.bodies) == 27
    usage = read_ledger(second)["usage"]["model"]
    assert (usage["requests"], usage["copied"]) == (0, 27)
    names = set(FILES) - {"ledger.json"}
    assert {name: digests(first.output)[name] for name in names} == {
        name: digests(second.output)[name] for name in names
    }


@pytest.mark.parametrize(("settings", "requests"), [({}, 27), ({"cache": True}, 27), ({"cache": False}, 54)])
def test_by_default_the_stores_cache_is_shared(
    fake: FakeChat, tmp_path: Path, settings: dict[str, Any], requests: int
) -> None:
    """Sampled answers too: each has its number and its seed in its key, and so its draw."""
    config = {"task": {"type": "responses", "n": 3}, "prompts": "data", "temperature": 1.0, **settings}
    contexts = [
        replace(make_context(tmp_path / name, endpoint=endpoint_of(fake), **config), cache=tmp_path / "store" / "cache")
        for name in ("one", "two")
    ]
    samples = []
    for context in contexts:
        synthesize(context)
        samples.append((context.output / "samples.jsonl").read_text())
    assert len(fake.bodies) == requests
    assert samples[0] == samples[1]
    assert (tmp_path / "store" / "cache" / "requests").is_dir() == (requests == 27)
    first = json.loads(samples[0].splitlines()[0])["texts"]
    assert len(set(first)) > 1, "the answers to one prompt are drawn one by one"


def test_more_answers_request_only_the_missing_answers(fake: FakeChat, tmp_path: Path) -> None:
    texts = {}
    for n in (2, 5):
        config = {"task": {"type": "responses", "n": n}, "prompts": "data", "endpoint": endpoint_of(fake)}
        context = replace(make_context(tmp_path / f"{n}", **config), cache=tmp_path / "cache")
        synthesize(context)
        texts[n] = [json.loads(line)["texts"] for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert len(fake.bodies) == 9 * 5
    assert [few == many[:2] for few, many in zip(texts[2], texts[5], strict=True)] == [True] * 9


def test_a_changed_answer_in_the_stores_cache_is_asked_for_again(fake: FakeChat, tmp_path: Path) -> None:
    config = {"task": {"type": "responses"}, "prompts": "data", "endpoint": endpoint_of(fake)}
    first, second = (
        replace(make_context(tmp_path / name, **config), cache=tmp_path / "cache") for name in ("one", "two")
    )
    synthesize(first)
    (file,) = (tmp_path / "cache" / "requests").iterdir()
    lines = file.read_text().splitlines(keepends=True)
    lines[0] = lines[0].replace('"text": "', '"text": "not this ')
    file.write_text("".join(lines))
    synthesize(second)
    assert len(fake.bodies) == 9 + 1
    assert (second.output / "samples.jsonl").read_text() == (first.output / "samples.jsonl").read_text()
    assert "1 lines in" in second.events.read_text()


def test_a_prompt_that_is_there_twice_has_answers_of_its_own(fake: FakeChat, tmp_path: Path) -> None:
    config = {"task": {"type": "responses", "n": 2}, "prompts": "data", "endpoint": endpoint_of(fake)}
    context = make_context(tmp_path, train=2, test=1, **config)
    same = [row | {"prompt": [user("Say it")]} for row in make_rows(2, "a")]
    write_rows(tmp_path / "prompts" / "train.parquet", same)
    synthesize(context)
    assert len(fake.bodies) == 6
    lines = (context.output / "samples.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["texts"] for line in lines[:2])
    assert len({*first, *second}) > 2


def test_unreachable_judge_is_refused_before_generation(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    gone = FakeChat()
    gone.stop()
    judge = {"endpoint": endpoint_of(gone)}
    refused(
        lambda: synthesize(
            make_context(tmp_path, task={"type": "pairs"}, endpoint=endpoint_of(fake), prompts="data", judge=judge)
        )
    )
    assert fake.bodies == []


def test_misspelled_scorer_is_refused_before_generation(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    config = {"task": {"type": "pairs"}, "prompts": "data", "score": "tests.support.stages.synthesis_harness:word_scor"}
    refused(lambda: synthesize(make_context(tmp_path, endpoint=endpoint_of(fake), **config)))
    assert fake.bodies == []
