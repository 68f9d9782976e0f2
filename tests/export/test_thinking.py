"""Advice on model cards of models that think."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from align.export.thinking import BY_MODEL_TYPE, BY_SWITCH, reasoning_parser, serving_advice
from align.models.built_in import make_tiny_tokenizer
from align.models.chat.template_settings import TemplateSettings

SWITCHED = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
OPENED = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>\n' if add_generation_prompt }}{# </think> #}"


def tokenizer_with(template: str, *tokens: str) -> Any:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "tokens", "model_type", "parser"),
    [
        (SWITCHED, (), "llama", None),  # off by default
        ("{% set enable_thinking = enable_thinking | default(true) %}" + SWITCHED, (), "llama", "qwen3"),
        (OPENED, ("<think>", "</think>"), "llama", "deepseek_r1"),
        (OPENED, (), "llama", None),  # marks of several tokens
        (OPENED, (), "glm4_moe", "glm45"),
        ("{{ '<|channel|>final' }}", (), "gpt_oss", "openai_gptoss"),
        ("{{ '<|channel>thought\n<channel|>' }}", (), "gemma4_text", "gemma4"),
        ("{{ '<seed:think></seed:think>' }}", (), "seed_oss", "seed_oss"),
        ("{{ '<|START_THINKING|><|END_THINKING|>' }}", (), "cohere2", "cohere_command3"),
        ("{{ '◁think▷◁/think▷' if enable_thinking }}", ("<think>", "</think>"), "kimi_vl", None),
        ("{{ messages[0].content }}", ("<think>", "</think>"), "qwen3", None),  # the template shows no thoughts
    ],
)
def test_parser_fits_the_template(template: str, tokens: tuple[str, ...], model_type: str, parser: str | None) -> None:
    assert reasoning_parser(tokenizer_with(template, *tokens), model_type) == parser


def test_advice_names_the_switch() -> None:
    tokenizer = tokenizer_with(SWITCHED)
    assert serving_advice(tokenizer, "qwen3") == [
        "Thoughts are off by default; a request with `chat_template_kwargs: {enable_thinking: true}` changes it."
    ]
    TemplateSettings("on").apply(tokenizer)
    assert serving_advice(tokenizer, "qwen3") == [
        "`vllm serve path/to/this/folder --reasoning-parser qwen3` returns its thoughts apart from its answers.",
        "Thoughts are on by default; a request with `chat_template_kwargs: {enable_thinking: false}` changes it.",
    ]
    assert serving_advice(make_tiny_tokenizer(), "llama") == []


def test_parsers_exist_in_vllm() -> None:
    package = importlib.util.find_spec("vllm")
    if package is None or not package.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    # Its list is read as text, because the import takes seconds.
    parsers = Path(package.submodule_search_locations[0], "reasoning", "__init__.py").read_text()
    for name in {*BY_MODEL_TYPE.values(), *BY_SWITCH.values(), "deepseek_r1"}:
        assert f'"{name}": (' in parsers
