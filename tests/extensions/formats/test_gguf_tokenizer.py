"""A tokenizer is written only in a form that llama.cpp reads as the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align.extensions.formats.gguf_file import plan_gguf, write_gguf
from align.extensions.formats.gguf_tokenizer import CASED, LLAMA_3, SPLITS, read_special_tokens, read_vocabulary
from align.models.built_in import CHAT_TEMPLATE, make_tiny_tokenizer
from tests.support.refusals import Refused

TEXT = ["The quick brown fox jumps over the lazy dog's 12345 bones.\n\n  Don't stop!", "Größe, naïve café, 日本語 🙂"]
QWEN = next(pattern for pattern, rule in SPLITS.items() if rule == "qwen2")


def split(pattern: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def digits() -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def byte_level(pre_tokenizer: Any, normalizer: Any = None, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that was trained on a few words."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return fast(tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE as SentencePiece has it: spaces are ``▁``, unknown characters are bytes."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    words = ["▁", "t", "h", "e", "n", "th", "the", "▁the", "▁then"]
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *bytes_, *words]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁the", "n")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<pad>", "<unk>")]
    tokenizer.add_special_tokens(special)
    return fast(tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "rule"),
    [
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2"),
        (byte_level(digits()), "smollm"),
        (byte_level(split(LLAMA_3), ignore_merges=True), "llama-bpe"),
        (byte_level(split(LLAMA_3)), "dbrx"),
        (byte_level(split(QWEN), normalizers.NFC()), "qwen2"),
        (byte_level(split(CASED)), "gpt-4o"),
    ],
    ids=["gpt-2", "smollm", "llama 3", "llama 3 without ignore_merges", "qwen2", "gpt-4o"],
)
def test_splitting_rule_is_read_from_the_tokenizer(tokenizer: Any, rule: str) -> None:
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), "here")
    assert (vocabulary.model, vocabulary.rule) == ("gpt2", rule)
    assert vocabulary.tokens == [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    assert vocabulary.kinds[:4] == [TokenType.CONTROL] * 4 and vocabulary.kinds[4] == TokenType.NORMAL
    assert len(vocabulary.merges) == len(tokenizer) - 4 - 256 and " " in vocabulary.merges[0]


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(split(r"\p{L}+")),
        byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()),
        byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    ],
    ids=["own rule", "space in front", "lower case", "no rule"],
)
def test_tokenizer_that_llama_cpp_lacks_is_refused(refused: Refused, tokenizer: Any) -> None:
    refused(lambda: read_vocabulary(tokenizer, len(tokenizer), "here"))


def test_word_level_tokenizer_is_refused_by_its_kind(refused: Refused) -> None:
    tokenizer = fast(Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")))
    refused(lambda: read_vocabulary(tokenizer, len(tokenizer), "here"))


def test_sentencepiece_merges_become_falling_scores() -> None:
    tokenizer = sentencepiece()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer) + 2, "here")
    assert (vocabulary.model, vocabulary.rule, vocabulary.adds_space) == ("llama", "default", True)
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert scores["th"] > scores["the"] > scores["▁the"] > scores["▁then"] > scores["n"]
    kinds = dict(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
    assert kinds["<unk>"] == TokenType.UNKNOWN and kinds["<s>"] == TokenType.CONTROL
    assert kinds["<0x41>"] == TokenType.BYTE and kinds["▁the"] == TokenType.NORMAL
    assert vocabulary.tokens[-1] == f"[PAD{len(tokenizer) + 1}]" and vocabulary.kinds[-1] == TokenType.UNUSED


def test_space_at_beginning_of_text_only_is_refused(refused: Refused) -> None:
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    refused(lambda: read_vocabulary(tokenizer, len(tokenizer), "here"))


def test_all_ends_of_generation_config_are_ends(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2, 3]}')
    special = read_special_tokens(tokenizer, tmp_path)
    assert special.ends == (2, 0, 3) and (special.bos, special.pad, special.adds_bos) == (1, 3, False)


def test_ends_and_template_are_in_the_file(tiny_model: Path, tmp_path: Path) -> None:
    plan = plan_gguf(tiny_model, "f16")
    write_gguf(plan, tmp_path / "tiny.gguf", "tiny")
    reader = GGUFReader(tmp_path / "tiny.gguf")
    values = {}
    for key in ("eos_token_id", "bos_token_id", "padding_token_id", "add_bos_token", "model", "pre"):
        field = reader.get_field(f"tokenizer.ggml.{key}")
        values[key] = None if field is None else field.contents()
    assert list(values.values()) == [2, 1, 3, False, "gpt2", "gpt-2"]
    template = reader.get_field("tokenizer.chat_template")
    assert template is not None and template.contents() == CHAT_TEMPLATE
