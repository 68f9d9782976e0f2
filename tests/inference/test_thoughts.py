"""Thoughts in responses: their place among the tokens, and the budget after which they are closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from align.errors import UserError
from align.inference.protocol import Response, Sampling, TurnRequest
from align.inference.thoughts import ThoughtReader, generate, require_answer_room, thought_rates
from align.inference.transformers import TransformersEngine
from align.models.built_in import TURN_END, make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
READER = ThoughtReader(TOKENIZER)
EOS = TOKENIZER.eos_token_id
CLOSING = "\n</think>\n\n"
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
)
GPT_OSS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{% if m.thinking %}{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content + '<|return|>' }}"
    "{% endfor %}"
)


def ids(text: str) -> list[int]:
    return [int(token) for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]


def response(text: str, finished: bool = True) -> Response:
    tokens = ids(text) + [EOS] * finished
    return Response(tokens, [-0.5] * len(tokens), finished, TOKENIZER.decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize(
    ("prompt", "text", "thought", "answer"),
    [
        ("hi\n", "Yes.", "", "Yes."),
        ("hi\n", "<think>\na\n</think>\n\nYes.", "<think>\na\n</think>\n\n", "Yes."),
        ("hi<think>\n", "a</think>Yes.", "a</think>", "Yes."),
        ("hi<think>\n\n</think>\n\n", "Yes.", "", "Yes."),  # the prompt closes its empty thought
        ("hi\n", "[THINK]a[/THINK]Yes.", "[THINK]a[/THINK]", "Yes."),
    ],
)
def test_thought_and_answer_are_split(prompt: str, text: str, thought: str, answer: str) -> None:
    read = READER.read(ids(prompt), response(text))
    assert read.thought_tokens == len(thought)  # a token is a byte
    assert read.answer_tokens == len(answer) + 1  # and the end of turn
    assert (read.answer_text, read.answer_text.thought, read.is_open) == (answer, thought, False)
    assert read.answer_text.full_text == text


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<|channel>thought", "<channel|>"),
        ("<seed:think>", "</seed:think>"),
        ("◁think▷", "◁/think▷"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
    ],
)
@pytest.mark.parametrize("is_special", [False, True])
def test_marks_of_families_split_thoughts(opening: str, closing: str, is_special: bool) -> None:
    tokenizer = make_tiny_tokenizer()
    marks = [AddedToken(text, special=is_special) for text in (opening.removesuffix("thought"), closing)]
    tokenizer.add_tokens(marks)
    reader = ThoughtReader(tokenizer)

    def read(prompt: str, text: str) -> Response:
        before, tokens = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
        visible = tokenizer.decode(tokens, skip_special_tokens=True)
        return reader.read(before, Response(tokens, [0.0] * len(tokens), False, visible))

    assert str(read("hi", f"{opening}\na 7\n{closing}Yes").answer_text) == "Yes"
    assert str(read(f"hi{opening}\n", f"a 7\n{closing}Yes").answer_text) == "Yes"
    assert reader.hides_marks is is_special
    is_open = read("hi", f"{opening}\na 7")
    assert (str(is_open.answer_text), is_open.is_open, is_open.answer_tokens) == ("", True, 0)
    assert tokenizer.decode(reader.closing_ids([], is_open)) == f"\n{closing}\n\n"


@pytest.mark.parametrize(("prompt", "text"), [("hi\n", "<think>a"), ("hi<think>\n", "a b")])
@pytest.mark.parametrize("finished", [False, True])
def test_open_thought_has_no_answer(prompt: str, text: str, finished: bool) -> None:
    read = READER.read(ids(prompt), response(text, finished))
    assert (read.answer_text, read.answer_tokens, read.is_open) == ("", 0, True)
    assert thought_rates([read, response("Yes")])["open_thoughts"] == 0.5


def test_special_marks_are_not_part_of_the_text() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokens = [int(token) for token in tokenizer("<think>ab</think>Yes", add_special_tokens=False)["input_ids"]]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert (len(tokens), text) == (7, "abYes")
    read = ThoughtReader(tokenizer).read([], Response(tokens, [0.0] * 7, True, text))
    assert (read.thought_tokens, read.thought_end, str(read.answer_text)) == (4, 2, "Yes")


@pytest.mark.parametrize(
    ("template", "text", "closing"),
    [
        (QWEN3, "<think>\na", "\n</think>\n\n"),
        (QWEN3, "<reasoning>a", "\n</reasoning>\n\n"),  # another mark than the template's
        (None, "[THINK]a", "\n[/THINK]\n\n"),
        (GPT_OSS, "<|channel|>analysis<|message|>a", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        (QWEN3, "<think>\na</think>Yes", ""),
        (QWEN3, "Yes", ""),
    ],
)
def test_closing_tokens_are_the_template_s(template: str | None, text: str, closing: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    assert ThoughtReader(tokenizer).closing_ids([], response(text, finished=False)) == ids(closing)


class Thinker:
    """A lockstep engine that writes a thought for each prompt, and an answer once the thought is closed."""

    name = "thinker"

    def __init__(self, thoughts: dict[str, str]) -> None:
        self.thoughts = thoughts
        self.batches: list[list[TurnRequest]] = []

    def sample(self, requests: list[TurnRequest], temperature: float, top_p: float) -> list[Response]:
        self.batches.append(requests)
        return [self._respond(request) for request in requests]

    def _respond(self, request: TurnRequest) -> Response:
        text = TOKENIZER.decode(request.prompt)
        name = text[0]
        rest = self.thoughts[name][len(text) - 1 :]
        if text.endswith("</think>\n\n"):
            rest = "Yes."
        tokens = [*ids(rest), EOS][: request.max_tokens]
        return Response(tokens, [-0.5] * len(tokens), tokens[-1] == EOS, "")


THOUGHTS = {"a": "<think>ab</think>No.", "b": "<think>abcdefghijklmnopq</think>No.", "c": "Just a long answer."}


def test_budget_closes_only_open_thoughts() -> None:
    engine: Any = Thinker(THOUGHTS)
    prompts = [ids(name) for name in THOUGHTS]
    rows = generate(engine, READER, prompts, Sampling(40, thinking_budget=20))
    texts = ["<think>ab</think>No.", "<think>abcdefghijklm\n</think>\n\nYes.", "Just a long answer."]
    assert [row[0].text for row in rows] == texts
    assert [row[0].answer_text for row in rows] == ["No.", "Yes.", "Just a long answer."]
    # b: 20 sampled tokens, 11 forced ones, "Yes." and the end of turn
    assert rows[1][0].mask == [True] * 20 + [False] * 11 + [True] * 5
    assert rows[1][0].logprobs == [-0.5] * 20 + [0.0] * 11 + [-0.5] * 5
    assert rows[0][0].mask == [True] * 21 and rows[2][0].mask == [True] * 20
    # a had reached the budget and closed its thought, so it continues as it is; c was complete.
    assert [request.max_tokens for request in engine.batches[0]] == [20, 20, 20]
    assert [request.max_tokens for request in engine.batches[1]] == [20, 9]
    assert engine.batches[1][1].prompt == prompts[1] + ids("<think>abcdefghijklm" + CLOSING)


def test_begun_mark_is_completed() -> None:
    engine: Any = Thinker({"a": "<think>ab</think>No."})
    ((completed,),) = generate(engine, READER, [ids("a")], Sampling(40, thinking_budget=12))
    assert completed.text == "<think>ab</think>\n\nYes."
    assert completed.mask == [True] * 12 + [False] * 7 + [True] * 5


def test_thought_stays_open_without_room_for_an_answer() -> None:
    engine: Any = Thinker(THOUGHTS)
    ((cut,),) = generate(engine, READER, [ids("b")], Sampling(21, thinking_budget=10))
    assert (cut.text, cut.is_open, cut.forced, len(engine.batches)) == ("<think>abc", True, [], 1)
    ((closed,),) = generate(engine, READER, [ids("b")], Sampling(22, thinking_budget=10))
    assert (closed.answer_text, closed.finished, len(closed.token_ids)) == ("Y", False, 22)


def test_budget_without_room_is_refused() -> None:
    require_answer_room(None, TOKENIZER, 12, "ppo")
    require_answer_room(10, TOKENIZER, 22, "ppo")
    with pytest.raises(UserError, match=r"^ppo: thinking_budget is 10, and the 11 tokens .* in max_tokens 21\. Lower"):
        require_answer_room(10, TOKENIZER, 21, "ppo")


def test_real_engine_continues_after_the_closing_tokens(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, device=torch.device("cpu"), dtype=torch.float32, batch_size=4)
    # The prompt opens the thought, and a random model closes none.
    prompts = [ids(f"{TURN_END}{name}<think>\n") for name in ("a", "bcd", "e")]
    sampling = Sampling(24, temperature=0.8, n=2, seed=3, thinking_budget=6)
    rows = generate(engine, READER, prompts, sampling)
    free = engine.generate(prompts, sampling)
    for prompt, row, free_row in zip(prompts, rows, free, strict=True):
        for limited, unlimited in zip(row, free_row, strict=True):
            assert limited.token_ids[:6] == unlimited.token_ids[:6]
            assert limited.forced == list(range(6, 17)) and limited.token_ids[6:17] == ids(CLOSING)
            # The engine's log-probabilities are those of the whole sequence, but for the forced tokens.
            (scores,) = engine.score_tokens([prompt], [limited.token_ids], 0.8)
            sampled = [value for value, is_sampled in zip(scores, limited.mask, strict=True) if is_sampled]
            expected = [value for value, is_sampled in zip(limited.logprobs, limited.mask, strict=True) if is_sampled]
            assert sampled == pytest.approx(expected, abs=1e-4)
    assert rows == generate(engine, READER, prompts, sampling)
    assert rows[0][0] != rows[0][1]
