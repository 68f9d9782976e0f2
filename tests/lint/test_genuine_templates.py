"""Templates of released models pass without waivers; what the models' own convention trains is no fault."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.rows import assistant
from align.lint.encodings import MASKED
from align.lint.linter import Options
from tests.support.lint.dialects import SPECS, make
from tests.support.lint.harness import SPOILT, alarms, all_answers, clean, encoded, instructions, look
from tests.support.lint.released_templates import TEMPLATES, tokenizer_of

WRITES_BEFORE_ANSWERS = {"glm4moe", "qwen3", "qwen3_6", "gptoss"}
KEEPS_EARLIER_TURNS = sorted(TEMPLATES.keys() - {"glm4moe", "gptoss", "phi3", "phi3_5", "qwen3", "qwen3_6"})
"""Templates that write an answer alike, its end included, whether others follow it or not."""


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_genuine_template_raises_no_alarm(name: str, stage: Any) -> None:
    rows = clean(60)
    findings = look(tokenizer_of(name), rows[:50], options=Options(stage), test=rows[50:])
    assert not alarms(findings)
    assert ("text-before-answer" in findings) == (name in WRITES_BEFORE_ANSWERS)


@pytest.mark.parametrize("name", KEEPS_EARLIER_TURNS)
def test_a_mask_of_every_answer_raises_no_alarm(name: str) -> None:
    tokenizer, rows = tokenizer_of(name), instructions()
    assert not alarms(look(tokenizer, rows, all_answers(tokenizer, rows), options=Options(supervise="all")))


@pytest.mark.parametrize("name", sorted(WRITES_BEFORE_ANSWERS))
def test_text_before_answers_needs_labels(name: str) -> None:
    """Sampling leaves that text to the model: a mask over the answer alone does not teach what is sampled."""
    tokenizer, rows = tokenizer_of(name), instructions()
    prepared = encoded(tokenizer, rows)
    row = prepared[SPOILT]
    answer = rows[SPOILT]["completion"][0]["content"]
    start = next(index for index, label in enumerate(row["labels"]) if label != MASKED)
    while not tokenizer.decode(row["input_ids"][start:]).startswith(answer):
        row["labels"][start] = MASKED
        start += 1
    findings = look(tokenizer, rows, prepared)
    assert alarms(findings) == {"generation-prompt-differs"}
    assert findings["generation-prompt-differs"].count == 1


def test_a_thought_that_is_written_out_is_the_answers() -> None:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("<think>\nLet me count.\n</think>\n\nThere are nine kinds.")]
    assert not alarms(look(tokenizer_of("qwen3"), rows))


def test_a_thought_that_training_does_not_close_is_a_fault() -> None:
    template = SPECS["chatml"].template.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    assert "generation-prompt-differs" in look(make(SPECS["chatml"], template=template), instructions())


OPEN_CHATML = SPECS["chatml"].template.replace(
    "+ '<|im_end|>\n'", "+ ('' if m['role'] == 'assistant' else '<|im_end|>\n')"
)


def test_template_with_open_answers_is_a_fault() -> None:
    tokenizer = make(SPECS["chatml"], template=OPEN_CHATML)
    ends = frozenset({tokenizer.convert_tokens_to_ids("<|im_end|>")})
    assert "earlier-turns-unclosed" in alarms(look(tokenizer, instructions(), options=Options(ends=ends)))


def test_template_that_ends_answers_at_a_header_passes() -> None:
    tokenizer = tokenizer_of("glm4moe")
    ends = frozenset(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"]))
    assert not alarms(look(tokenizer, instructions(), options=Options(ends=ends)))
