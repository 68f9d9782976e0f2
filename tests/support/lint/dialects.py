"""Nine chat dialects: templates written from their documented formats, each with a tokenizer made on the spot.

Byte-level tokenizers stand for those of GPT-2's line, byte-fallback ones for those of SentencePiece's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog and then it goes home to sleep for a while",
    "please tell me what is the answer to this question about numbers and words in a sentence",
    "user assistant system model tool human said that she would like an explanation of how things work",
    "USER: ASSISTANT: A chat between a curious user and an artificial intelligence assistant",
]


@dataclass(frozen=True)
class Spec:
    """A dialect: ``system`` says whether it takes system turns, ``strict`` whether it insists on alternating roles."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    byte_level: bool = True
    system: bool = True
    strict: bool = False
    injects: bool = False
    turn_end: str = ""
    """The token that closes an answer, where that is not ``eos``."""


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATE = (
    "{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}{% endfor %}"
)
LLAMA_2 = ALTERNATE + (
    "{% set head = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (head if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = ALTERNATE + (
    "{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = ALTERNATE + (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant.' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}"
    "{% elif m['role'] != 'system' %}{{ ' ' + m['role'] + ': ' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
QWEN_TOOLS = (
    "{% set given = messages[0]['role'] == 'system' %}"
    "{% set words = messages[0]['content'] if given else 'You are a careful assistant made by a laboratory.' %}"
    "{{ '<|im_start|>system\n' + words }}{% if tools %}{{ '\n\n# Tools\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% elif not (loop.first and given) %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for call in m['tool_calls'] or [] %}"
    "{{ '\n<tool_call>\n' + call['function'] | tojson + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPECS: dict[str, Spec] = {
    "chatml": Spec(CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|endoftext|>"),
    "llama-2": Spec(LLAMA_2, ("<unk>", "<s>", "</s>", "<pad>"), "<s>", "</s>", "<pad>", byte_level=False, strict=True),
    "llama-3": Spec(
        LLAMA_3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|pad|>",
    ),
    "mistral": Spec(
        MISTRAL,
        ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"),
        "<s>",
        "</s>",
        "<pad>",
        byte_level=False,
        strict=True,
    ),
    "gemma": Spec(
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<end_of_turn>",
        "<pad>",
        byte_level=False,
        system=False,
        strict=True,
    ),
    "zephyr": Spec(ZEPHYR, ("<unk>", "<s>", "</s>", "<pad>"), "<s>", "</s>", "<pad>", byte_level=False),
    "phi-3": Spec(
        PHI_3,
        ("<unk>", "<s>", "<|endoftext|>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>"),
        "<s>",
        "<|end|>",
        "<|endoftext|>",
        byte_level=False,
    ),
    "vicuna": Spec(VICUNA, ("<unk>", "<s>", "</s>", "<pad>"), "<s>", "</s>", "<pad>", byte_level=False, injects=True),
    "qwen-tools": Spec(
        QWEN_TOOLS, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|endoftext|>", injects=True
    ),
}

FOREIGN = {
    "chatml": "llama-3", "llama-2": "chatml", "llama-3": "gemma", "mistral": "chatml", "gemma": "chatml",
    "zephyr": "gemma", "phi-3": "llama-3", "vicuna": "llama-3", "qwen-tools": "mistral",
}  # fmt: skip
"""For each template the dialect whose tokenizer is put under it by mistake."""


@cache
def tokenizer_of(name: str) -> Any:
    """The dialect's tokenizer, shared: read-only by agreement."""
    return make(SPECS[name])


def make(spec: Spec, special: tuple[str, ...] | None = None, template: str | None = None) -> Any:
    """A new tokenizer, with other special tokens or another template where given."""
    names = spec.special if special is None else special
    core = (_byte_level if spec.byte_level else _byte_fallback)(names)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=spec.bos,
        eos_token=spec.eos if spec.eos in names else names[-1],
        pad_token=spec.pad,
        unk_token="<unk>" if "<unk>" in names else None,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = spec.template if template is None else template
    return tokenizer


def _byte_level(special: tuple[str, ...]) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return core


def _byte_fallback(special: tuple[str, ...]) -> Tokenizer:
    """Words begin with ``▁``; what the vocabulary lacks, line breaks too, falls apart into bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    inner = json.loads(trained.to_str())["model"]
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for token in inner["vocab"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(pair) for pair in inner["merges"]]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return core
