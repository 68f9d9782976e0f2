"""Control tokens that were added and never trained are found by their embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align.lint.chat_format import ChatFormat
from align.lint.findings import Findings
from align.lint.trainer import check_embeddings
from align.models.loading import load_policy, load_tokenizer

ADDED = ("<|turn_start|>", "<|turn_stop|>")


@pytest.fixture
def grown(tiny_model: Path) -> tuple[Any, Any, ChatFormat]:
    """A model whose embeddings transformers has resized for two new tokens, which its template writes."""
    model, tokenizer = load_policy(tiny_model), load_tokenizer(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(ADDED)})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|turn_start|>' + m['role'] + '\n' + m['content'] + '<|turn_stop|>' }}{% endfor %}"
    )
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size + len(ADDED)))
    return model, tokenizer, ChatFormat.of(tokenizer)


def findings_of(model: Any, chat_format: ChatFormat) -> list[str]:
    findings = Findings()
    check_embeddings(model, chat_format, findings)
    return [example.excerpt for finding in findings.result() for example in finding.examples]


def test_a_models_own_tokens_are_trained(tiny_model: Path) -> None:
    assert not findings_of(load_policy(tiny_model), ChatFormat.of(load_tokenizer(tiny_model)))


def test_tokens_that_resizing_has_added(grown: tuple[Any, Any, ChatFormat]) -> None:
    model, _, chat_format = grown
    assert findings_of(model, chat_format) == [f"{name!r} is embedded as the mean of all tokens" for name in ADDED]


def test_zeros_and_copies(grown: tuple[Any, Any, ChatFormat]) -> None:
    model, tokenizer, chat_format = grown
    start, stop = (tokenizer.convert_tokens_to_ids(name) for name in ADDED)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[start] = weight[0]
        weight[stop] = 0.0
    assert findings_of(model, chat_format) == [f"{ADDED[1]!r} is embedded as zeros"]
    with torch.no_grad():
        weight[stop] = weight[start]
    assert findings_of(model, chat_format) == [
        f"{ADDED[0]!r} has the embedding of {ADDED[1]!r}",
        f"{ADDED[1]!r} has the embedding of {ADDED[0]!r}",
    ]
