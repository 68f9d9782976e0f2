"""A tokenizer as GGUF metadata: tokens, merges or scores, kinds of tokens, special tokens and the chat template.

llama.cpp has its own tokenizers, chosen by two names. A tokenizer is written only if it has the same parts:
byte-level BPE with six splitting rules, or the BPE of SentencePiece with bytes for unknown characters. Only
GPT-2's rule was compared with llama.cpp on text (``docs/export.md``). An export compares its own tokenizer if
``llama-cpp-python`` is installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.models.checkpoints.files import read_optional

if TYPE_CHECKING:
    from gguf import GGUFWriter

Part = Mapping[str, Any]
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + CONTRACTIONS
    + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + CONTRACTIONS
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = CONTRACTIONS + WORDS + r"|\p{N}{1,3}" + REST
SPLITS = {
    CONTRACTIONS + WORDS + r"|\p{N}" + REST: "qwen2",
    CASED: "gpt-4o",
}
"""Regular expression that splits text before BPE → llama.cpp's name of the rule. Llama 3's depends on the merges."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"
SUPPORTED = "byte-level BPE as in GPT-2, SmolLM, Llama 3, Qwen 2 or GPT-4o, and BPE of SentencePiece"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp knows it."""

    model: str
    """``gpt2`` for byte-level BPE, ``llama`` for SentencePiece."""
    rule: str
    tokens: list[str]
    kinds: list[int]
    """Kind of each token (``gguf.TokenType``)."""
    merges: list[str]
    scores: list[float]
    """For SentencePiece; a merge is better the higher the score of its result."""
    adds_space: bool = False
    """A space is put before the text."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens; ``ends`` are all that end an answer, the tokenizer's eos first."""

    bos: int | None
    pad: int | None
    unknown: int | None
    ends: tuple[int, ...]
    adds_bos: bool


def read_vocabulary(tokenizer: Any, rows: int, place: str) -> Vocabulary:
    """Return a tokenizer's vocabulary for a model with ``rows`` rows of embeddings.

    Raises ``UserError`` for a kind of tokenizer that is not supported.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    rule = None
    adds_space = False
    if model["type"] == "BPE":
        # Behind a byte-level splitting rule a byte fallback never applies: every byte is a token.
        rule = _split_rule(backend)
        if rule is None and model.get("byte_fallback") and _is_sentencepiece(backend):
            rule = "default"
            adds_space = _adds_space(backend)
    if rule is None:
        raise UserError(
            f"{place}: --format gguf does not support this kind of tokenizer ({model['type']}, "
            f"{_names(backend.get('pre_tokenizer')) or 'no pre-tokenizer'}). Supported: {SUPPORTED}. Use --format "
            "transformers."
        )
    tokens, kinds = _tokens(tokenizer, rows, is_sentencepiece=rule == "default")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if rule == "default":
        return Vocabulary("llama", rule, tokens, kinds, [], _scores(tokens, kinds, merges), adds_space)
    return Vocabulary("gpt2", rule, tokens, kinds, merges, [])


def read_special_tokens(tokenizer: Any, folder: Path) -> SpecialTokens:
    """Return a tokenizer's special tokens, and all tokens that end an answer by it or by the generation config."""
    named = read_optional(folder / "generation_config.json").get("eos_token_id")
    more = named if isinstance(named, list) else [named]
    ends = [tokenizer.eos_token_id, *(token for token in more if token is not None)]
    first = tokenizer("a").input_ids[0]
    return SpecialTokens(
        bos=tokenizer.bos_token_id,
        pad=tokenizer.pad_token_id,
        unknown=tokenizer.unk_token_id,
        ends=tuple(dict.fromkeys(ends)),
        adds_bos=tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id,
    )


def add_tokenizer(writer: GGUFWriter, vocabulary: Vocabulary, special: SpecialTokens, template: str) -> None:
    """Write a tokenizer's metadata."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    else:
        # GGUF has no empty arrays. This merge never applies: its parts are not single bytes.
        never = f"{vocabulary.tokens[special.ends[0]]} {vocabulary.tokens[special.ends[0]]}"
        writer.add_token_merges(vocabulary.merges or [never])
    writer.add_eos_token_id(special.ends[0])
    # llama.cpp has three fields for tokens that end an answer; it finds more by their usual texts.
    for token, add in zip(special.ends[1:], (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token)
    for index, add in (
        (special.bos, writer.add_bos_token_id),
        (special.pad, writer.add_pad_token_id),
        (special.unknown, writer.add_unk_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(special.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(template)


def _tokens(tokenizer: Any, rows: int, is_sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Return the text and the kind of each row's token; rows without a token are unused."""
    from gguf import TokenType

    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens: list[str] = []
    kinds: list[int] = []
    for index in range(rows):
        kind = TokenType.NORMAL
        text = texts.get(index)
        if text is None:
            text = f"[PAD{index}]"
            kind = TokenType.UNUSED
        elif index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
            # llama.cpp looks for these texts before it replaces spaces.
            text = text if added[index].special else text.replace(SPACE, " ")
        elif is_sentencepiece and BYTE.fullmatch(text):
            kind = TokenType.BYTE
        if is_sentencepiece and index == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        tokens.append(text)
        kinds.append(int(kind))
    return tokens, kinds


def _scores(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str]) -> list[float]:
    """Return SentencePiece's scores: the earlier a merge, the higher the score of its result."""
    from gguf import TokenType

    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    # Single characters are results of no merge, so their scores are never compared.
    scores = []
    for text, kind in zip(tokens, kinds, strict=True):
        is_plain = kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
        scores.append(-float(ranks.get(text, len(merges))) if is_plain else 0.0)
    return scores


def _steps(part: Part | None, key: str) -> list[Part]:
    """Return the steps of a normalizer or pre-tokenizer, which may be a sequence, a single step or absent."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _names(part: Part | None) -> str:
    key = "pretokenizers"
    return " and ".join(str(step["type"]) for step in _steps(part, key))


def _split_rule(backend: Part) -> str | None:
    """Return llama.cpp's name of a byte-level BPE's splitting rule; None for a rule that it does not have."""
    normalizers = [step["type"] for step in _steps(backend.get("normalizer"), "normalizers")]
    steps = _steps(backend.get("pre_tokenizer"), "pretokenizers")
    # NFC is part of Qwen's tokenizer. llama.cpp does without; text that is typed is in this form.
    if normalizers not in ([], ["NFC"]) or not steps or steps[-1]["type"] != "ByteLevel":
        return None
    if steps[-1]["add_prefix_space"]:
        return None
    before = steps[:-1]
    if steps[-1].get("use_regex", True):
        if not before:
            return "gpt-2"
        is_digits = len(before) == 1 and before[0]["type"] == "Digits" and before[0]["individual_digits"]
        return "smollm" if is_digits else None
    if not before:
        # Without merges every byte is a token, and no rule can matter.
        return None if backend["model"]["merges"] else "gpt-2"
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated" or before[0]["invert"]:
        return None
    pattern = before[0]["pattern"].get("Regex")
    if pattern == LLAMA_3:
        return "llama-bpe" if backend["model"].get("ignore_merges") else "dbrx"
    return SPLITS.get(pattern)


def _adds_space(backend: Part) -> bool:
    steps = _steps(backend.get("normalizer"), "normalizers")
    if any(step["type"] == "Prepend" and step["prepend"] == SPACE for step in steps):
        return True
    before = _steps(backend.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme") == "always" for step in before)


def _is_sentencepiece(backend: Part) -> bool:
    """Return whether spaces become ``▁`` and nothing else happens to a text."""
    normalizers = _steps(backend.get("normalizer"), "normalizers")
    steps = _steps(backend.get("pre_tokenizer"), "pretokenizers")
    replaces = any(step["type"] == "Replace" and step["content"] == SPACE for step in normalizers)
    is_known = {step["type"] for step in normalizers} <= {"Prepend", "Replace"}
    # Gemma splits at spaces, of which none is left.
    splits = [step for step in steps if step["type"] == "Split" and step["pattern"].get("String") == " "]
    metaspaces = [step for step in steps if step["type"] == "Metaspace" and not step.get("split", True)]
    # llama.cpp puts a space after every special token or after none, and not only at the beginning of the text.
    if any(step.get("prepend_scheme") == "first" for step in metaspaces):
        return False
    return is_known and len(splits) + len(metaspaces) == len(steps) and (replaces or bool(metaspaces))
