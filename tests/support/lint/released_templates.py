"""Chat templates of released models, as trl ships them, each with a byte-level tokenizer of its control tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import trl
from transformers import PreTrainedTokenizerFast

from tests.support.lint.dialects import _byte_level

FOLDER = Path(trl.__file__).parent / "chat_templates"
PAD = "<|test_pad|>"


@dataclass(frozen=True)
class Genuine:
    """A template's control tokens; the first of ``ends`` is the tokenizer's eos."""

    ends: tuple[str, ...]
    others: tuple[str, ...] = ()
    bos: str | None = None


CHATML = Genuine(("<|im_end|>",), ("<|im_start|>", "<|endoftext|>"))
LLAMA_3 = Genuine(("<|eot_id|>",), ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"), "<|begin_of_text|>")
GEMMA = Genuine(("<end_of_turn>",), ("<start_of_turn>", "<eos>"), "<bos>")
PHI_3 = Genuine(("<|endoftext|>", "<|end|>"), ("<|user|>", "<|assistant|>", "<|system|>"))
COHERE = Genuine(
    ("<|END_OF_TURN_TOKEN|>",),
    ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
     "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    "<BOS_TOKEN>",
)  # fmt: skip
TEMPLATES = {
    "cohere": COHERE,
    "cohere2": COHERE,
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "glm4moe": Genuine(
        ("<|endoftext|>",), ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    ),
    "lfm2": Genuine(("<|im_end|>",), ("<|im_start|>",), "<|startoftext|>"),
    "llama3": LLAMA_3,
    "llama3_1": LLAMA_3,
    "llama3_2": LLAMA_3,
    "phi3": PHI_3,
    "phi3_5": PHI_3,
    "qwen2_5": CHATML,
    "qwen3": CHATML,
    "qwen3_instruct_2507": CHATML,
    "qwen3_6": CHATML,
    "gptoss": Genuine(
        ("<|return|>", "<|end|>"), ("<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>")
    ),
}
"""By file name. Templates that open a thought before an answer which has none (DeepSeek-R1's) are not among them."""


@cache
def tokenizer_of(name: str) -> Any:
    """The template's tokenizer, shared: read-only by agreement."""
    spec = TEMPLATES[name]
    names = (*spec.ends, *spec.others, *((spec.bos,) if spec.bos else ()), PAD)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(names),
        bos_token=spec.bos,
        eos_token=spec.ends[0],
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer
