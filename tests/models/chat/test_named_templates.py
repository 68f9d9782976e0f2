"""Templates by name: their texts are those of the published formats, rendered by transformers."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from align.models.built_in import make_tiny_tokenizer
from align.models.chat.chat_template import limit_templates
from align.models.chat.named_templates import (
    TEMPLATES,
    explain_no_template,
    fitting_templates,
    has_template,
    read_template,
    require_tokens,
    template_file,
)
from align.models.chat.render import render_conversation, render_prompt
from align.models.chat.special_tokens import turn_end_token
from tests.support.refusals import Refused

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3?"},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
TEXTS = {
    "alpaca": "<s>Be brief.\n\n### Instruction:\n2 + 2?\n\n### Response:\n4</s>\n\n### Instruction:\nAnd 3?"
    "\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4"
    "<|im_end|>\n<|im_start|>user\nAnd 3?<|im_end|>\n<|im_start|>assistant\n",
    "chatml-tools": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nAnd 3?<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\n2 + 2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n"
    "<start_of_turn>user\nAnd 3?<end_of_turn>\n<start_of_turn>model\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n2 + 2? [/INST] 4 </s><s>[INST] And 3? [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd 3?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\n2 + 2?[/INST] 4</s>[INST] And 3?[/INST]",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\n2 + 2?<|end|>\n<|assistant|>\n4<|end|>\n<|user|>\nAnd 3?<|end|>\n"
    "<|assistant|>\n",
    "qwen2.5": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4"
    "<|im_end|>\n<|im_start|>user\nAnd 3?<|im_end|>\n<|im_start|>assistant\n",
    "tulu": "<|system|>\nBe brief.\n<|user|>\n2 + 2?\n<|assistant|>\n4</s>\n<|user|>\nAnd 3?\n<|assistant|>\n",
    "vicuna": "<s>Be brief. USER: 2 + 2? ASSISTANT: 4</s>USER: And 3? ASSISTANT:",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\n2 + 2?</s>\n<|assistant|>\n4</s>\n<|user|>\nAnd 3?</s>\n"
    "<|assistant|>\n",
}
"""The prompt of TALK in each format, as its publishers describe it; <s> and </s> stand for bos and eos."""
FIRST = {
    "alpaca": f"<s>{ALPACA}### Instruction:\nHi\n\n### Response:\n",
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "vicuna": f"<s>{VICUNA}USER: Hi ASSISTANT:",
}
"""The prompt of a single question where a format has a system text of its own."""


def tokenizer_with(name: str) -> Any:
    """Return the byte tokenizer with the template, its tokens, and <s> and </s> as bos and eos."""
    limit_templates()
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokens = list(TEMPLATES[name].tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    if tokens:
        tokenizer.eos_token = tokens[-1]
    tokenizer.chat_template = read_template(name, Path("nowhere"))
    return tokenizer


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer_with(name).apply_chat_template(messages, tokenize=False, **options))


def test_every_template_has_its_text() -> None:
    assert (
        set(TEXTS) == set(TEMPLATES) == {file.stem for file in template_file("chatml", Path()).parent.glob("*.jinja")}
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_the_published_format(name: str) -> None:
    assert render(name, TALK, add_generation_prompt=True) == TEXTS[name]
    question = [{"role": "user", "content": "Hi"}]
    if name in FIRST:
        assert render(name, question, add_generation_prompt=True) == FIRST[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversation_continues_its_prompt_up_to_the_turn_end(name: str) -> None:
    tokenizer = tokenizer_with(name)
    end = TEMPLATES[name].tokens[-1] if TEMPLATES[name].tokens else "</s>"
    assert turn_end_token(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    answered = [*TALK, {"role": "assistant", "content": "3"}]
    prompt, whole = render_prompt(tokenizer, TALK), render_conversation(tokenizer, answered)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]).strip().replace(" ", "") == f"3{end}"


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"chatml", "chatml-tools", "zephyr", "qwen2.5", "tulu"}))
def test_a_role_that_the_format_lacks_is_refused(refused: Refused, name: str) -> None:
    refused(render, name, [*TALK, {"role": "tool", "content": "5"}])


@pytest.mark.parametrize("name", ["gemma", "llama2", "mistral"])
def test_a_system_message_is_never_dropped(refused: Refused, name: str) -> None:
    refused(lambda: render(name, TALK[:1]))


TRL = {"llama3": "llama3", "qwen2.5": "qwen2_5", "phi3": "phi3"}


@pytest.mark.parametrize("name", TRL)
def test_texts_equal_those_of_the_models_own_templates(name: str) -> None:
    """trl carries the templates of some models for its own tests."""
    tokenizer = tokenizer_with(name)
    for messages in (TALK, TALK[1:], TALK[1:2]):
        own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        published = (resources.files("trl") / "chat_templates" / f"{TRL[name]}.jinja").read_text()
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=published
        )
        assert own == theirs


def test_qwen_template_writes_tools_as_the_models_own() -> None:
    tokenizer = tokenizer_with("qwen2.5")
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4"},
    ]
    published = (resources.files("trl") / "chat_templates" / "qwen2_5.jinja").read_text()
    texts = [
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, chat_template=template)
        for template in (None, published)
    ]
    assert texts[0] == texts[1]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>' in texts[0]


def test_chatml_with_tools() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    assert render("chatml-tools", messages, tools=[tool]) == (
        "<|im_start|>system\nYou may call these functions:\n<tools>\n"
        '{"name": "add", "parameters": {"type": "object", "properties": {}}}\n</tools>\n'
        'To call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\n'
        "<|im_start|>user\n2 + 2?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "add", "arguments": {"a": 2, "b": 2}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    )


def test_names_and_paths(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert read_template("own.jinja", tmp_path) == "{{ messages }}"
    assert template_file("./own.jinja", tmp_path) == tmp_path / "own.jinja"
    refused(template_file, "lama3", tmp_path)
    refused(template_file, "my/own.jinja", tmp_path)
    (tmp_path / "empty.jinja").write_text(" \n")
    refused(read_template, "empty.jinja", tmp_path)


def test_a_token_that_the_vocabulary_lacks_names_add_tokens(refused: Refused) -> None:
    require_tokens("chatml", {"<|im_start|>", "<|im_end|>"}, "it")
    require_tokens("own.jinja", set(), "it")
    refused(require_tokens, "chatml", {"<|im_start|>", "<|eot_id|>"}, "the vocabulary of 'base'")


def test_fitting_templates_have_their_tokens_first() -> None:
    fitting = fitting_templates({"<|im_start|>", "<|im_end|>"})
    assert fitting[:3] == ["chatml", "chatml-tools", "qwen2.5"] and "llama3" not in fitting and "zephyr" in fitting
    assert "chatml, chatml-tools, qwen2.5, alpaca" in explain_no_template("base", {"<|im_start|>", "<|im_end|>"})


def test_templates_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert has_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert has_template(tmp_path)
