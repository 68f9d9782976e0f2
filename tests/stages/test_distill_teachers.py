"""Stage distill with served teachers, privileged prompts, several teachers and another tokenizer, on tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.checks.stage import check_inputs
from align.data.rows import write_rows
from align.inference import endpoint_client
from align.models.built_in import make_tiny
from align.models.chat.render import render_prompt
from align.models.loading import load_policy, load_tokenizer
from align.pipeline.context import StageContext
from align.stages import distill as work
from align.stages.distill import run
from align.store.artifacts import Artifact, Kind
from align.training.divergence import ABSENT, Measure, TopTokens, summed_divergence
from align.training.rows import MASKED, encode_supervised
from tests.support.inference.fake_chat import FakeChat
from tests.support.inference.fake_scorer import scorer
from tests.support.models.joining_tokenizer import make_joining_tokenizer
from tests.support.refusals import Refused
from tests.support.stages.stage_contexts import distill_stage
from tests.support.training.harness import events, losses, rows, warnings

SYSTEM = "The word is {row[word]}."


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights than the student's."""
    return make_tiny(tmp_path_factory.mktemp("teacher") / "model", seed=5, hidden_size=96, layers=3)


@pytest.fixture
def server(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChat]:
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.01)
    fake = FakeChat(scorer(teacher))
    yield fake
    fake.stop()


def endpoint(server: FakeChat, **fields: Any) -> dict[str, Any]:
    # With a name the teacher may move to another port.
    return {"url": server.url, "model": "good-model", "name": "teacher", "retries": 1, "timeout": 20, **fields}


def stage_of(root: Path, student: Path, teacher: Any, inputs: Any = None, **fields: Any) -> StageContext:
    """Return a stage with blocks as teachers, on rows with a column ``word``; ``inputs`` are stages' checkpoints."""
    stage = distill_stage(root, student, student, **{"teacher": teacher, "top_k": 16, **fields})
    for split, records in (("train", rows(24)), ("test", rows(8, start=24))):
        for number, record in enumerate(records):
            record |= {"word": record["completion"][0]["content"], "source": "ab"[number % 2]}
        write_rows(root / "data" / f"{split}.parquet", records)
    del stage.inputs["teacher"]
    return replace(stage, inputs={**stage.inputs, "teacher": None, "teacher.stage": inputs})


def checkpoint(root: Path, name: str, model: Path) -> Artifact:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(model)
    return Artifact(name, Kind.MODEL, folder, {"key": name})


def targets_of(stage: StageContext, monkeypatch: pytest.MonkeyPatch) -> tuple[list[TopTokens], list[dict[str, Any]]]:
    """Run one step; return the teachers' tokens for the training rows, and the rows."""
    seen: dict[str, Any] = {}
    fit = work.fit

    def watch(trainer: Any, context: StageContext, score: Any) -> Any:
        seen["tokens"], seen["rows"] = trainer.top_tokens, trainer.train_dataset.to_list()
        return fit(trainer, context, score)

    monkeypatch.setattr(work, "fit", watch)
    run(stage)
    return seen["tokens"], seen["rows"]


def logprobs_by(model: Path, ids: list[int], labels: list[int]) -> torch.Tensor:
    """The log-probabilities (N, V) at a row's labeled tokens, by one plain pass."""
    with torch.no_grad():
        logits = load_policy(model)(torch.tensor([ids])).logits[0]
    predicting = [index - 1 for index, label in enumerate(labels) if index and label != MASKED]
    return logits[predicting].log_softmax(-1)


def test_tail_bin_by_hand() -> None:
    # The teacher's two likeliest tokens have 0.5 and 0.3, so its tail has 0.2. The student gives them 0.4 and 0.2.
    # forward: 0.5 ln(0.5/0.4) + 0.3 ln(0.3/0.2) + 0.2 ln(0.2/0.4) = 0.111572 + 0.121640 - 0.138629 = 0.094582
    # reverse: 0.4 ln(0.4/0.5) + 0.2 ln(0.2/0.3) + 0.4 ln(0.4/0.2) = -0.089257 - 0.081093 + 0.277259 = 0.106908
    # jsd, mixture (0.45, 0.25, 0.3): half of 0.5 ln(5/4.5) + 0.3 ln(3/2.5) + 0.2 ln(2/3) = 0.026284, and of
    # 0.4 ln(4/4.5) + 0.2 ln(2/2.5) + 0.4 ln(4/3) = 0.023330
    student = torch.tensor([[0.4, 0.1, 0.2, 0.3]]).log()
    tokens = TopTokens(torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.3]]).log())
    # An absent third entry changes nothing, whatever its id.
    padded = TopTokens(torch.tensor([[0, 2, 0]]), torch.tensor([[0.5, 0.3, 0.0]]).log())
    assert padded.logprobs[0, 2] == ABSENT
    for kind, expected in (("forward", 0.094582), ("reverse", 0.106908), ("jsd", 0.024807)):
        for teacher in (tokens, padded):
            measure = Measure(kind, top_k=2)  # type: ignore[arg-type]
            divergence = summed_divergence(measure, student, torch.nn.Identity(), teacher)
            assert float(divergence) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_token_without_distribution_teaches_nothing(kind: Any) -> None:
    student = torch.randn(2, 5, requires_grad=True)
    nothing = TopTokens(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), ABSENT))
    divergence = summed_divergence(Measure(kind, top_k=3), student, torch.nn.Identity(), nothing)
    divergence.backward()
    assert divergence.item() == 0
    assert student.grad is not None
    assert student.grad.abs().sum() == 0


def test_served_teacher_equals_local_one(tiny_model: Path, teacher: Path, server: FakeChat, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"top_k": 16, "max_steps": 2, "on_policy": 0.7, "max_tokens": 4}
    local = distill_stage(tmp_path / "local", tiny_model, teacher, **fields)
    served = stage_of(tmp_path / "served", tiny_model, {"endpoint": endpoint(server)}, **fields)
    expected, metrics = run(local), run(served)
    assert metrics["own_steps"] == 1
    assert losses(served) == pytest.approx(losses(local), rel=1e-4)
    for name in ("test_divergence_before", "test_divergence_after"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
    assert server.bodies[0].keys() == {"model", "prompt", "max_tokens", "prompt_logprobs"}
    # 24 and 8 rows of the data, and 8 sampled ones.
    assert len(server.bodies) == metrics["teacher_rows_computed"] == 40


def test_dead_teacher_loses_nothing(
    refused: Refused, tiny_model: Path, teacher: Path, server: FakeChat, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"max_steps": 3, "save_steps": 1, "on_policy": 1.0, "max_tokens": 4}
    whole = stage_of(tmp_path / "a" / "whole", tiny_model, {"endpoint": endpoint(server)}, **fields)
    run(whole)
    # 32 rows of the data and 8 of each step: the server dies within the third step.
    answer, answered = scorer(teacher), []

    def die(body: dict[str, Any]) -> Any:
        if len(answered) == 52:
            raise ConnectionError
        answered.append(body)
        return answer(body)

    server.reply = die
    parts = stage_of(tmp_path / "b" / "parts", tiny_model, {"endpoint": endpoint(server)}, **fields)
    refused(run, parts)
    again = FakeChat(scorer(teacher))
    again_stage = stage_of(tmp_path / "b" / "parts", tiny_model, {"endpoint": endpoint(again)}, **fields)
    metrics = run(again_stage)
    again.stop()
    assert metrics["resumed_from_step"] == 2
    assert len(answered) + len(again.bodies) == 56  # no row is scored twice
    assert losses(again_stage) == losses(whole)


def test_server_that_returns_fewer_is_refused(
    refused: Refused, tiny_model: Path, server: FakeChat, tmp_path: Path
) -> None:
    stage = stage_of(tmp_path / "run", tiny_model, {"endpoint": endpoint(server)}, top_k=64)
    refused(run, stage)
    full = server.reply
    server.reply = lambda body: full(body | {"prompt_logprobs": 5})
    few = stage_of(tmp_path / "few", tiny_model, {"endpoint": endpoint(server)}, max_steps=1)
    run(few)
    assert any("the server returns 6 of the 16 log-probabilities" in message for message in warnings(few))


def test_another_vocabulary_is_refused(refused: Refused, tiny_model: Path, server: FakeChat, tmp_path: Path) -> None:
    full = server.reply

    def swap(body: dict[str, Any]) -> Any:
        reply = full(body)
        for entry in reply["choices"][0]["prompt_logprobs"][1:]:
            entry[str(body["prompt"][-1])] = {"logprob": -1.0, "decoded_token": "</s>"}
        return reply

    server.reply = swap
    refused(lambda: run(stage_of(tmp_path / "run", tiny_model, {"endpoint": endpoint(server)})))


def test_teacher_of_row_is_chosen_by_column(
    refused: Refused, tiny_model: Path, teacher: Path, server: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_tiny(tmp_path / "other", seed=9)
    blocks = [{"match": "a", "stage": "x"}, {"match": "b", "endpoint": endpoint(server)}]
    inputs = [checkpoint(tmp_path, "x", other)]
    fields: dict[str, Any] = {"teacher_column": "source", "max_steps": 1}
    tokens, trained = targets_of(stage_of(tmp_path / "run", tiny_model, blocks, inputs, **fields), monkeypatch)
    for number in (0, 1, 22, 23):
        row = trained[number]
        expected = logprobs_by(other if number % 2 == 0 else teacher, row["input_ids"], row["labels"])
        assert torch.allclose(tokens[number].logprobs, expected.topk(16).values, atol=1e-4)
    assert len(server.bodies) == 16
    blocks[0]["match"] = "c"
    refused(lambda: run(stage_of(tmp_path / "missing", tiny_model, blocks, inputs, **fields)))


def test_student_with_privileged_prompt_teaches_itself(
    refused: Refused, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(tmp_path / "run", tiny_model, {"self": True, "system": SYSTEM}, max_steps=1)
    tokens, trained = targets_of(stage, monkeypatch)
    tokenizer = load_tokenizer(tiny_model)
    for number, source in enumerate(rows(24)[:3]):
        word, row = source["completion"][0]["content"], trained[number]
        prompt = [{"role": "system", "content": f"The word is {word}."}, *source["prompt"]]
        answer = [label for label in row["labels"] if label != MASKED]
        before = render_prompt(tokenizer, prompt)
        expected = logprobs_by(tiny_model, before + answer, [MASKED] * len(before) + answer)
        assert torch.allclose(tokens[number].logprobs, expected.topk(16).values, atol=1e-4)
    unknown = stage_of(tmp_path / "b", tiny_model, {"self": True, "system": "{row[hint]}"}, max_steps=1)
    refused(run, unknown)


def test_student_comes_nearer_to_itself_with_prompt(tiny_model: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"epochs": 6, "on_policy": 0.5, "max_tokens": 6}
    metrics = run(stage_of(tmp_path / "run", tiny_model, {"self": True, "system": SYSTEM}, **fields))
    assert metrics["test_divergence_after"] < 0.7 * metrics["test_divergence_before"]


@pytest.fixture(scope="module")
def other_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a BPE of some 280 tokens."""
    folder = make_tiny(tmp_path_factory.mktemp("bpe") / "model", seed=7)
    tokenizer, model = make_joining_tokenizer(), load_policy(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_other_tokenizer_teaches_where_text_aligns(
    refused: Refused, tiny_model: Path, other_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = checkpoint(tmp_path, "bpe", other_tokens)
    same = stage_of(tmp_path / "same", tiny_model, {"stage": "bpe"}, inputs)
    refused(run, same)
    refused(check_inputs, same, Kind.POLICY)
    stage = stage_of(tmp_path / "run", tiny_model, {"stage": "bpe", "tokens": "aligned"}, inputs, max_steps=1)
    check_inputs(stage, Kind.POLICY)
    tokens, trained = targets_of(stage, monkeypatch)
    own, other = load_tokenizer(tiny_model), load_tokenizer(other_tokens)
    (read,) = encode_supervised(other, rows(1, start=4), 128).rows
    # "violet" is v, i, o, l, e, t for the student, and v, i, o, l, et for the teacher. The ends of the turn align.
    answer = [label for label in read["labels"] if label != MASKED]
    assert [other.decode([token]) for token in answer] == [*"viol", "et", "<|im_end|>"]
    assert (tokens[4].logprobs > ABSENT).any(dim=1).tolist() == [True] * 4 + [False] * 2 + [True]
    expected = logprobs_by(other_tokens, read["input_ids"], read["labels"])
    for place, index in ((0, 0), (3, 3), (6, 5)):
        found = dict(zip(tokens[4].ids[place].tolist(), tokens[4].logprobs[place].tolist(), strict=True))
        best = expected[index].topk(16)
        for token, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            text = other.decode([token])
            (own_token, *more) = own(text, add_special_tokens=False)["input_ids"]
            if "\ufffd" not in text and not more:
                assert found.pop(own_token) == pytest.approx(logprob, abs=1e-4)
        assert set(found.values()) <= {ABSENT}
    # Only "violet" has joined letters, in 3 of the 24 rows.
    total = sum(label != MASKED for row in trained for label in row["labels"])
    # The first step samples, so the teacher also reads answers that it renders itself.
    fields: dict[str, Any] = {"max_steps": 1, "on_policy": 0.7, "max_tokens": 4}
    again = stage_of(tmp_path / "again", tiny_model, {"stage": "bpe", "tokens": "aligned"}, inputs, **fields)
    metrics = run(again)
    assert metrics["own_steps"] == 1
    assert losses(again)[1] > 0
    assert (metrics["tokens_not_aligned"], metrics["tokens_taught"]) == (6, total - 6)
    assert (metrics["teacher_rows_cached"], metrics["teacher_rows_computed"]) == (32, 0)
    assert any(f"6 of {total} answer tokens" in event["message"] for event in events(again, "note"))


def test_completions_teach_text_that_aligns(
    refused: Refused,
    tiny_model: Path,
    other_tokens: Path,
    teacher: Path,
    server: FakeChat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = {"endpoint": endpoint(server), "api": "completions"}
    tokens, trained = targets_of(stage_of(tmp_path / "same", tiny_model, block, max_steps=1), monkeypatch)
    row = trained[0]
    expected = logprobs_by(teacher, row["input_ids"], row["labels"])
    present = tokens[0].logprobs[0] > ABSENT
    ids = tokens[0].ids[0][present].long()
    assert len(ids) >= 8  # the others are bytes without a text
    assert torch.allclose(tokens[0].logprobs[0][present], expected[0][ids], atol=1e-4)
    server.reply = scorer(other_tokens)
    block["endpoint"]["name"] = "other"
    refused(lambda: run(stage_of(tmp_path / "other", tiny_model, block)))
    metrics = run(stage_of(tmp_path / "aligned", tiny_model, {**block, "tokens": "aligned"}, max_steps=1))
    assert metrics["tokens_not_aligned"] == 6
