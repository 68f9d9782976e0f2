"""A tokenizer for each family of chat templates: byte-level or byte-fallback, with the family's control tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from align.models.chat.chat_template import limit_templates
from align.models.chat.named_templates import FOLDER, read_training_template
from tests.support.lint.dialects import _byte_fallback, _byte_level

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers, as in <b>1 + 2</b>.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
TOOLS = [ADD, {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]


@dataclass(frozen=True)
class Family:
    """Control tokens of a family; ``eos`` ends its turns, and ``plain`` are added tokens that are not special."""

    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    plain: tuple[str, ...] = ()
    tools: bool = True
    byte_level: bool = True


PAD = "<|test_pad|>"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
R1 = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
FAMILIES = {
    "deepseek-r1": Family(R1, R1[1], R1[0], plain=("<think>", "</think>"), tools=False),
    "chatml": Family(CHATML, "<|im_end|>", tools=False),
    "chatml-tools": Family(CHATML, "<|im_end|>"),
    "smollm2": Family(CHATML, "<|im_end|>", tools=False),
    "smollm3": Family(CHATML, "<|im_end|>", plain=TAGS),
    "qwen2.5": Family(CHATML, "<|im_end|>", plain=TAGS[2:4]),
    "qwen3": Family(CHATML, "<|im_end|>", plain=TAGS),
    "llama3": Family(LLAMA3, "<|eot_id|>", "<|begin_of_text|>", tools=False),
    "llama3.1": Family(LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
    "mistral": Family(
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "</s>",
        "<s>",
        byte_level=False,
    ),
    "olmo3": Family(
        CHATML, "<|endoftext|>", plain=("<functions>", "</functions>", "<function_calls>", "</function_calls>")
    ),
}  # fmt: skip
"""By the name of their template."""


@cache
def tokenizer_of(name: str) -> Any:
    """The family's tokenizer with its training template, shared: read-only by agreement."""
    return make(name)


def make(name: str, strips: bool = False) -> Any:
    """Return a new tokenizer of a family; with ``strips``, its end of turn takes the white space behind it."""
    limit_templates()
    family = FAMILIES[name]
    core = (_byte_level if family.byte_level else _byte_fallback)((*family.special, PAD))
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain])
    if strips:
        core.add_special_tokens([AddedToken(family.eos, special=True, normalized=False, rstrip=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    if name == "chatml-tools":
        tokenizer.chat_template = (FOLDER / "chatml-tools.jinja").read_text()
    else:
        tokenizer.chat_template = read_training_template(name)
    return tokenizer


def released_template(name: str) -> str:
    """Return a template as its publishers released it."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
