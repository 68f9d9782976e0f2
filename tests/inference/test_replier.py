"""Replies of a real model: pieces are the whole reply, settings are the checkpoint's, probabilities are right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from align.errors import UserError
from align.inference.replier import Replier, ReplyOptions, ReplyToken
from align.inference.thoughts import ThoughtReader
from align.inference.transformers import TransformersEngine
from align.models.built_in import make_tiny_tokenizer

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def replier(tiny_model: Path) -> Replier:
    return Replier(tiny_model, temperature=0, max_tokens=12)


def test_a_real_model_streams_what_it_would_say_at_once(replier: Replier) -> None:
    pieces = list(replier.reply(HI))
    assert pieces == list(replier.reply(HI))
    whole = replier.start(HI, ReplyOptions(temperature=0, max_tokens=12))
    assert "".join(token.text for token in whole.sample()) == "".join(answer for _, answer in pieces)
    assert not any(thought for thought, _ in pieces)
    long = [{"role": "user", "content": "x" * 900}, {"role": "assistant", "content": "y" * 900}]
    reply = replier.start(
        [{"role": "system", "content": "S"}, *long, {"role": "user", "content": "z" * 900}], ReplyOptions()
    )
    assert len(reply.prompt) < 1000
    assert reply.dropped_turns == 2
    assert "S" in replier.tokenizer.decode(reply.prompt)


def test_a_message_longer_than_the_context_is_refused(replier: Replier) -> None:
    with pytest.raises(UserError, match="Shorten the last message"):
        replier.start([{"role": "user", "content": "x" * 5000}], ReplyOptions())


def test_probabilities_are_those_of_the_model(replier: Replier, tiny_model: Path) -> None:
    reply = replier.start(HI, ReplyOptions(temperature=0.7, top_p=0.9, seed=1, max_tokens=10, alternatives=5))
    tokens = list(reply.sample())
    assert [token.id for token in tokens] == reply.tokens
    assert "".join(token.text for token in tokens) == reply.text
    engine = TransformersEngine(tiny_model, device=torch.device("cpu"), dtype=torch.float32, batch_size=1)
    expected = engine.score_tokens([reply.prompt], [reply.tokens], 1.0)[0]
    assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-4)
    for token in tokens:
        values = [value for _, value in token.alternatives]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0] + 1e-6


def test_equal_seeds_give_equal_replies(replier: Replier) -> None:
    options = ReplyOptions(temperature=1.0, seed=4, max_tokens=16)
    replies = [replier.start(HI, options) for _ in range(2)]
    texts = ["".join(token.text for token in reply.sample()) for reply in replies]
    assert texts[0] == texts[1]
    other = replier.start(HI, ReplyOptions(temperature=1.0, seed=5, max_tokens=16))
    assert [token.id for token in other.sample()] != replies[0].tokens


def test_top_k_of_one_token_is_greedy(replier: Replier) -> None:
    greedy = replier.start(HI, ReplyOptions(temperature=0, max_tokens=12))
    single = replier.start(HI, ReplyOptions(temperature=2.0, top_k=1, max_tokens=12))
    assert [token.id for token in single.sample()] == [token.id for token in greedy.sample()]


def test_settings_and_stop_tokens_are_the_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    greedy = Replier(folder).start(HI, ReplyOptions(temperature=0, max_tokens=12))
    third = [token.id for token in greedy.sample()][2]
    first = greedy.tokens.index(third)
    settings = {"temperature": 0.0, "top_p": 0.8, "top_k": 7, "eos_token_id": [0, third]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    reply = Replier(folder).start(HI, ReplyOptions(max_tokens=12))
    assert (reply.options.temperature, reply.options.top_p, reply.options.top_k) == (0.0, 0.8, 7)
    assert reply.options.seed is not None
    assert [token.id for token in reply.sample()] == greedy.tokens[: first + 1]
    assert reply.is_finished
    with pytest.raises(UserError, match="has no switch for thoughts"):
        Replier(folder).start(HI, ReplyOptions(thinking="on"))


def test_thoughts_and_calls_are_found_in_a_reply(replier: Replier, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = replier.start(HI, ReplyOptions())
    text = '<think>So.</think>Yes.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    reply.tokens = replier.tokenizer(text, add_special_tokens=False)["input_ids"]
    reply._decoded = text
    end, is_open = reply.thought_end()
    assert text[:end] == "<think>So.</think>"
    assert not is_open
    monkeypatch.setattr(reply._tokenizer, "chat_template", reply._tokenizer.chat_template + "{# <tool_call> #}")
    (call,) = reply.parse_calls().calls
    assert (call.name, call.arguments) == ("add", {"a": 1})


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<|channel>thought\nSo.<channel|>Yes.", "<think>\nSo.\n</think>\n\n", "Yes."),
        ("<|channel>thought\nSo", "<think>\nSo", ""),
        ("<think>So.</think>Yes.", "<think>So.</think>", "Yes."),
    ],
)
def test_special_marks_of_thoughts_are_written_out(
    text: str, thought: str, answer: str, replier: Replier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tiny_tokenizer()
    marks = [AddedToken(mark, special=mark != "thought") for mark in ("<|channel>", "thought", "<channel|>")]
    tokenizer.add_tokens([*marks, AddedToken("<think>"), AddedToken("</think>")])
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    reply = replier.start(HI, ReplyOptions())
    reply._tokenizer, reply._reader = tokenizer, ThoughtReader(tokenizer)

    def sample() -> Iterator[ReplyToken]:
        for token in ids:
            reply.tokens.append(token)
            yield reply._describe(token, torch.zeros(len(tokenizer)))

    monkeypatch.setattr(reply, "sample", sample)
    monkeypatch.setattr(replier, "start", lambda turns, options: reply)
    pieces = list(replier.reply(HI))
    assert "".join(part for part, _ in pieces) == thought
    assert "".join(part for _, part in pieces) == answer
    assert reply.marked()[:2] == (thought + answer, len(thought))


def test_thoughts_with_special_marks_leave_the_conversation(replier: Replier, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [*HI, {"role": "assistant", "content": "<think>\nSo.\n</think>\n\nYes."}, *HI]

    def prompt() -> str:
        return str(replier.tokenizer.decode(replier.start(turns, ReplyOptions()).prompt))

    assert "So." in prompt()
    monkeypatch.setattr(ThoughtReader, "hides_marks", True)
    assert "So." not in prompt() and "Yes." in prompt()
