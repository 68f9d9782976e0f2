"""Stage pretrain, end to end on a tiny model: it learns a domain's texts, and resumes exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.config.stages.sft import PretrainConfig
from align.config.validation import validate
from align.data.rows import write_rows
from align.models.loading import load_policy, load_tokenizer
from align.stages.pretrain import run
from align.training.rows import MASKED, Ends, document_ends, encode_texts
from tests.support.refusals import Refused
from tests.support.stages.stage_contexts import PRETRAIN_FIELDS, pretrain_stage, verse
from tests.support.training.harness import events, losses
from tests.support.training.killed_stage import Killed, dying


@pytest.mark.parametrize("tuning", [{"method": "full"}, {"method": "lora", "rank": 16, "alpha": 64}], ids=str)
def test_it_learns_a_domain(tuning: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    stage = pretrain_stage(tmp_path, tiny_model, tuning=tuning, epochs=12, eval_steps=40)
    metrics = run(stage)
    assert metrics["test_bits_per_byte_after"] < metrics["test_bits_per_byte_before"] / 3
    assert metrics["test_perplexity_after"] == pytest.approx(math.exp(metrics["test_loss_after"]), rel=1e-4)
    # bytes are this tokenizer's tokens: the cost of one is the loss in bits
    assert metrics["test_bits_per_byte_after"] == pytest.approx(metrics["test_loss_after"] / math.log(2))
    assert (metrics["texts"], metrics["test_texts"]) == (60, 12)
    assert metrics["packs"] < 60 and metrics["pack_fill"] > 0.9
    assert not events(stage, "warning")
    model, tokenizer = load_policy(stage.output / "model"), load_tokenizer(stage.output / "model")
    start = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode("kilo li", add_special_tokens=False)]])
    text = tokenizer.decode(model.generate(start, do_sample=False, max_new_tokens=8)[0, 1:])
    assert text.startswith("kilo lima")


def test_held_out_loss_is_that_of_each_text_alone(tiny_model: Path, tmp_path: Path) -> None:
    stage = pretrain_stage(tmp_path, tiny_model, max_steps=1)
    metrics = run(stage)
    model, tokenizer = load_policy(tiny_model), load_tokenizer(tiny_model)
    nats = tokens = size = 0.0
    for number in range(60, 72):
        ids = tokenizer.encode(verse(number), add_special_tokens=False)
        size += len(verse(number).encode())
        for start in range(0, len(ids), 63):
            window = ids[start : start + 63]
            before = ids[start - 1] if start else tokenizer.eos_token_id
            with torch.no_grad():
                logprobs = model(torch.tensor([[before, *window]])).logits.log_softmax(-1)[0, :-1]
            nats -= float(logprobs.gather(1, torch.tensor(window)[:, None]).sum())
            tokens += len(window)
    assert metrics["test_loss_before"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["test_bits_per_byte_before"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_resumed_run_equals_the_uninterrupted_one(tiny_model: Path, tmp_path: Path) -> None:
    uninterrupted = pretrain_stage(tmp_path / "whole", tiny_model, epochs=3, save_steps=4)
    expected = run(uninterrupted)
    parts = pretrain_stage(tmp_path / "parts", tiny_model, epochs=3, save_steps=4)
    with pytest.raises(Killed):
        run(dying(parts, 10))
    metrics = run(parts)
    assert metrics["resumed_from_step"] == 8
    assert losses(parts) == losses(uninterrupted) and metrics["tokens"] == expected["tokens"]
    expected_weights, resumed_weights = (
        load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts)
    )
    assert all(expected_weights[name].equal(resumed_weights[name]) for name in expected_weights)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def test_windows_share_a_token_and_learn_each_token_once(tokenizer: Any) -> None:
    ends = document_ends(tokenizer, None, "x")
    assert ends == Ends(tokenizer.eos_token_id, tokenizer.eos_token_id)
    encoded = encode_texts(tokenizer, [{"text": "abcdefghij"}, {"text": "xy"}, {"text": ""}], 5, ends)
    shown = [tokenizer.decode(row["input_ids"]) for row in encoded.rows]
    end = tokenizer.eos_token
    assert shown == [f"{end}abcd", "defgh", f"hij{end}", f"{end}xy{end}"]
    assert all(row["labels"] == [MASKED, *row["input_ids"][1:]] for row in encoded.rows)
    assert encoded.counts == {"skipped: no token": 1}
    scored = encode_texts(tokenizer, [{"text": "abcdefghij"}], 5, ends, learn_end=False)
    learned = [label for row in scored.rows for label in row["labels"] if label != MASKED]
    assert tokenizer.decode(learned) == "abcdefghij"


def test_documents_begin_with_bos_if_texts_do(tokenizer: Any) -> None:
    class WithBos:
        eos_token, bos_token_id = tokenizer.eos_token, 7

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            return [7, *ids] if add_special_tokens else ids

    assert document_ends(WithBos(), None, "x") == Ends(7, tokenizer.eos_token_id)
    assert document_ends(WithBos(), "!", "x").end == tokenizer.encode("!", add_special_tokens=False)[0]


def test_an_end_of_several_tokens_is_refused(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    refused(lambda: run(pretrain_stage(tmp_path, tiny_model, document_end="The end")))


def test_no_text_is_an_error(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    stage = pretrain_stage(tmp_path, tiny_model)
    write_rows(tmp_path / "data" / "train.parquet", [{"id": "0", "source": "t", "text": ""}])
    refused(lambda: run(replace(stage)))


@pytest.mark.parametrize(
    "extra",
    [
        {"document_ends": "x"},
        {"dat": "x"},
        {"trainer": {"packing": True}},
        {"tuning": {"method": "prompt"}},
    ],
)
def test_mistakes_are_named(refused: Refused, extra: dict[str, Any]) -> None:
    refused(validate, PretrainConfig, {**PRETRAIN_FIELDS, **extra}, "p.yaml: stages.x")
