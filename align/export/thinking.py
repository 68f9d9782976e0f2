"""Advice for serving an exported model that thinks: vLLM's reasoning parser, and the template's switch. Torch-free.

Without a parser a server returns thoughts as part of the answer.
"""

from __future__ import annotations

from typing import Any

from align.data.final_answers import PAIRS
from align.models.chat.template_settings import thinking_state, thinking_switch

BY_MODEL_TYPE = {
    "cohere": "cohere_command3",
    "deepseek_v3": "deepseek_v3",
    "gemma4": "gemma4",
    "glm4": "glm45",
    "gpt_oss": "openai_gptoss",
    "mistral": "mistral",
    "ministral": "mistral",
    "olmo3": "olmo3",
    "qwen3": "qwen3",
    "seed_oss": "seed_oss",
}
"""Beginning of ``model_type`` → vLLM 0.31's parser of the family's thoughts."""
BY_SWITCH = {"enable_thinking": "qwen3", "thinking": "deepseek_v3"}
"""Variable that turns thoughts on and off → parser of other models with ``<think>``."""
TAG = "</think>"
MARKS = (TAG, *PAIRS.values(), "<|channel|>")
"""Marks of thoughts in the templates of models that think."""


def reasoning_parser(tokenizer: Any, model_type: str) -> str | None:
    """Return the name of vLLM's ``--reasoning-parser``; None if the model does not think, or no parser fits."""
    template = _template(tokenizer)
    # A parser takes an answer without a thought for a thought, if thoughts are off.
    if thinking_state(tokenizer) == "off" or not any(mark in template for mark in MARKS):
        return None
    for beginning, name in BY_MODEL_TYPE.items():
        if model_type.startswith(beginning):
            return name
    if TAG not in template:
        return None
    switch = thinking_switch(template)
    if switch is not None:
        return BY_SWITCH[switch]
    # The parser needs each mark as one token.
    vocabulary = tokenizer.get_vocab()
    return "deepseek_r1" if {"<think>", "</think>"} <= vocabulary.keys() else None


def serving_advice(tokenizer: Any, model_type: str) -> list[str]:
    """Return sentences for the model card of a model with thoughts; none for other models."""
    advice = []
    parser = reasoning_parser(tokenizer, model_type)
    if parser is not None:
        advice.append(
            f"`vllm serve path/to/this/folder --reasoning-parser {parser}` returns its thoughts apart from its answers."
        )
    switch = thinking_switch(_template(tokenizer))
    if switch is not None:
        state = thinking_state(tokenizer)
        other = "false" if state == "on" else "true"
        advice.append(
            f"Thoughts are {state} by default; a request with `chat_template_kwargs: {{{switch}: {other}}}` changes it."
        )
    return advice


def _template(tokenizer: Any) -> str:
    """Return the chat template; of several by name, the default."""
    template = tokenizer.chat_template or ""
    return str(template if isinstance(template, str) else template["default"])
