"""``supervise: all``: every answer of a conversation has labels, whatever the chat template, and nothing else has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.stages.sft import SftConfig
from align.data.rows import assistant, user, write_rows
from align.models.loading import load_policy, load_tokenizer
from align.stages.sft import run
from align.store.artifacts import Artifact, Kind
from align.training.rows import MASKED, NOT_TRAINED, SPLIT_UP, encode_answers, encode_supervised
from tests.support.chat_templates import THINKS
from tests.support.training.harness import context, events

TALK = {"prompt": [user("one"), assistant("first"), user("two"), assistant("second"), user("three")]}
ROW = {**TALK, "completion": [assistant("third")]}
TEMPLATES = {
    "chatml": None,
    "llama": (
        "{{ '<|im_start|>' }}{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
    ),
    "no mark of its own": (
        "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A: ' }}{{ m['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    ),
}


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def runs(tokenizer: Any, row: dict[str, list[int]]) -> list[str]:
    """Texts of the stretches with labels."""
    actual, text = [], []
    for token, label in zip([*row["input_ids"], 0], [*row["labels"], MASKED], strict=True):
        assert label in (MASKED, token)
        if label != MASKED:
            text.append(token)
        elif text:
            actual.append(tokenizer.decode(text))
            text = []
    return actual


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_answer_and_its_end_are_learned_with_any_template(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    encoded = encode_answers(tokenizer, [ROW], 400)
    (row,) = encoded.rows
    assert runs(tokenizer, row) == ["first<|im_end|>", "second<|im_end|>", "third<|im_end|>"]
    assert row["input_ids"] == encode_supervised(tokenizer, [ROW], 400).rows[0]["input_ids"]
    assert encoded.lengths == [len(row["input_ids"])] and not encoded.counts


def test_an_answer_that_is_not_to_be_trained_on_has_no_labels(tokenizer: Any) -> None:
    prompt = [user("one"), assistant("first") | {"train": False}, *TALK["prompt"][2:]]
    (row,) = encode_answers(tokenizer, [{**ROW, "prompt": prompt}], 400).rows
    assert runs(tokenizer, row) == ["second<|im_end|>", "third<|im_end|>"]
    assert row["input_ids"] == encode_answers(tokenizer, [ROW], 400).rows[0]["input_ids"]  # the template sees no mark


@pytest.mark.parametrize("encode", [encode_answers, encode_supervised])
def test_a_row_without_an_answer_to_train_on_is_left_out(encode: Any, tokenizer: Any) -> None:
    unmarked = {**ROW, "completion": [assistant("third")]}
    marked = {
        "prompt": [
            message | {"train": False} if message["role"] == "assistant" else message for message in ROW["prompt"]
        ],
        "completion": [assistant("third") | {"train": False}],
    }
    encoded = encode(tokenizer, [{**ROW, **marked}, unmarked], 400)
    assert (len(encoded.rows), encoded.counts) == (1, {NOT_TRAINED: 1})


def test_template_that_rewrites_answers_gives_a_row_for_each(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKS
    encoded = encode_answers(tokenizer, [ROW], 400)
    assert [runs(tokenizer, row) for row in encoded.rows] == [
        [f"(thinks) {word}<|im_end|>"] for word in ("first", "second", "third")
    ]
    assert "(thinks) first" not in tokenizer.decode(encoded.rows[1]["input_ids"])  # as sampling would see it
    assert encoded.counts == {SPLIT_UP: 1}


def test_a_cut_conversation_keeps_the_answers_that_fit(tokenizer: Any) -> None:
    full = encode_answers(tokenizer, [ROW], 400).rows[0]
    first = full["labels"].index(MASKED, next(index for index, label in enumerate(full["labels"]) if label != MASKED))
    encoded = encode_answers(tokenizer, [ROW], first + 3)
    assert runs(tokenizer, encoded.rows[0]) == ["first<|im_end|>"]
    none = encode_answers(tokenizer, [ROW], 5)
    assert not none.rows and sum(none.counts.values()) == 1


def test_all_answers_are_trained_and_the_linter_agrees(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, numbers in (("train", range(24)), ("test", range(24, 30))):
        rows = [{**ROW, "id": str(n), "source": "t", "checks": ""} for n in numbers]
        for row in rows:
            row["prompt"] = [user(f"one {row['id']}"), *TALK["prompt"][1:]]
        write_rows(folder / f"{split}.parquet", rows)
    config = SftConfig(model="model", data="data", supervise="all", learning_rate=1e-2, epochs=10, batch_size=8,
                       max_length=256, precision="float32")  # fmt: skip
    stage = context(tmp_path, config, tiny_model, Artifact("data", Kind.INSTRUCTIONS, folder, {}))
    metrics = run(stage)
    assert metrics["test_loss_after"] < metrics["test_loss_before"] / 5
    assert not events(stage, "warning")
    import torch

    from align.models.chat.render import render_prompt

    model, tokenizer = load_policy(stage.output / "model"), load_tokenizer(tiny_model)
    ids = torch.tensor([render_prompt(tokenizer, [user("one 99")])])
    message = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert tokenizer.decode(message) == "first<|im_end|>"
