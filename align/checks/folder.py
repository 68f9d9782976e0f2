"""Check one model folder: weights, vocabulary, head, template and special tokens.

The last check, that the template ends a turn with eos, renders a conversation with transformers' tokenizer. It is
skipped where ``align.json`` records it for the same template and tokenizer. All others are torch-free.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from align.checks.facts import (
    Facts,
    head_of,
    read_facts,
    read_json,
    special_token,
    template_text,
    token_ids,
    tokenizer_digest,
)
from align.checks.faults import Fault
from align.checks.weights import (
    HEAD,
    WIDTHS,
    Damaged,
    Tensor,
    all_zero,
    not_finite,
    read_tensors,
    tensor_digest,
    weights_digest,
)

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
ADAPTER = "adapter"
"""Folder inside a model folder, with an adapter that cannot be merged and works on the weights beside it."""


def check_folder(folder: Path, reward: bool, *, values: bool = True) -> list[Fault]:
    """Return every fault of a checkpoint's folder, which should be a reward model if ``reward``.

    ``values`` reads all weights for NaN and infinity, about two seconds per GiB; without it only headers are read.
    """
    place = str(folder)
    try:
        tensors = read_tensors(folder)
    except Damaged as error:
        return [Fault("weights-truncated", place, str(error))]
    config = read_json(folder / "config.json")
    if not config:
        return [Fault("weights-truncated", place, "has no config.json that can be read")]
    wrong_kind = _kind(place, config, reward)
    # A model of the wrong kind would fail the other checks too.
    if wrong_kind:
        return wrong_kind
    facts = read_facts(folder)
    faults = [
        *_values(place, tensors, values),
        *_vocabulary(folder, config, tensors),
        *(_head(place, tensors, facts) if reward else []),
        *_adapter(folder, tensors, facts),
        *_changes(folder, facts),
        *_special_tokens(folder),
    ]
    # Rendering is slow and misleading with a wrong template or tokenizer.
    if not any(fault.name in ("pad-is-eos", "template-changed", "tokenizer-changed") for fault in faults):
        faults += _turn_end(folder, facts)
    return faults


def _kind(place: str, config: dict[str, Any], reward: bool) -> list[Fault]:
    kinds = [str(kind) for kind in config.get("architectures") or []]
    if not kinds:
        return []
    scores = any(kind.endswith("ForSequenceClassification") for kind in kinds)
    if scores != reward:
        expected = "a reward model" if reward else "a generative model"
        return [Fault("wrong-kind", place, f"should be {expected} and its config says {kinds[0]}")]
    labels = len(config.get("id2label") or {}) or 1
    if reward and labels != 1:
        return [Fault("wrong-kind", place, f"is a classifier with {labels} labels, where a reward model has one score")]
    return []


def _values(place: str, tensors: dict[str, Tensor], values: bool) -> list[Fault]:
    unsupported = next((tensor for tensor in tensors.values() if tensor.dtype not in WIDTHS and tensor.size > 1), None)
    if unsupported is not None:
        return [Fault("weights-dtype", place, f"has the tensor {unsupported.name} of type {unsupported.dtype}")]
    not_finite_name = not_finite(tensors) if values else None
    return (
        []
        if not_finite_name is None
        else [Fault("weights-not-finite", place, f"has NaN or infinity in {not_finite_name}")]
    )


def _vocabulary(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[Fault]:
    ids = token_ids(folder)
    tokens = max(ids.values()) + 1 if ids else 0
    # Embedding and head have one row per token.
    named = [tensor for name, tensor in tensors.items() if name.endswith((*EMBEDDINGS, HEAD))]
    vocab_size = (config.get("text_config") or config).get("vocab_size")
    for tensor in named:
        if tokens > tensor.shape[0]:
            problem = f"has a tokenizer of {tokens} tokens and {tensor.shape[0]} rows in {tensor.name}"
            return [Fault("vocabulary-size", str(folder), problem)]
        if isinstance(vocab_size, int) and vocab_size != tensor.shape[0]:
            problem = f"has {tensor.shape[0]} rows in {tensor.name} and a vocab_size of {vocab_size} in its config"
            return [Fault("vocabulary-size", str(folder), problem)]
    return []


def _head(place: str, tensors: dict[str, Tensor], facts: Facts | None) -> list[Fault]:
    head = head_of(tensors)
    # transformers fills a missing head with random numbers and only warns.
    if head is None:
        return [Fault("score-head", place, "has no score head, and a random one would be put there")]
    if head.dtype in WIDTHS and all_zero(head):
        return [Fault("score-head", place, f"has a score head of zeros ({head.name}): it was never trained")]
    if facts is not None and facts.head is not None and tensor_digest(head) != facts.head:
        return [Fault("score-head", place, "has another score head than the trained one: a random one replaced it")]
    return []


def _adapter(folder: Path, tensors: dict[str, Tensor], facts: Facts | None) -> list[Fault]:
    """Check that a stored adapter is intact and was trained on the weights beside it."""
    if not (folder / ADAPTER).is_dir():
        return []
    try:
        not_finite_name = not_finite(read_tensors(folder / ADAPTER))
    except Damaged as error:
        return [Fault("weights-truncated", str(folder / ADAPTER), str(error))]
    if not_finite_name is not None:
        return [Fault("weights-not-finite", str(folder / ADAPTER), f"has NaN or infinity in {not_finite_name}")]
    if facts is None or facts.adapter_base is None:
        return []
    if weights_digest(tensors) == facts.adapter_base:
        return []
    return [Fault("adapter-base", str(folder / ADAPTER), "was trained on other weights than those beside it")]


def _changes(folder: Path, facts: Facts | None) -> list[Fault]:
    if facts is None:
        return []
    faults: list[Fault] = []
    text = template_text(folder)
    if facts.template is not None and (text is None or hashlib.sha256(text.encode()).hexdigest() != facts.template):
        faults.append(Fault("template-changed", str(folder), "has another chat template than it was trained with"))
    if facts.tokenizer is not None and tokenizer_digest(folder) != facts.tokenizer:
        faults.append(Fault("tokenizer-changed", str(folder), "has another tokenizer than it was trained with"))
    for name, trained_with in (("eos_token", facts.eos), ("pad_token", facts.pad)):
        current = special_token(folder, name)
        if current != trained_with:
            faults.append(
                Fault("tokenizer-changed", str(folder), f"has {name} {current!r}; it was trained with {trained_with!r}")
            )
    return faults


def _special_tokens(folder: Path) -> list[Fault]:
    pad, eos = special_token(folder, "pad_token"), special_token(folder, "eos_token")
    if pad is not None and pad == eos:
        problem = f"pads with its end of turn, {eos!r}: masked as padding, the end of an answer is never learned"
        return [Fault("pad-is-eos", str(folder), problem)]
    ids = token_ids(folder)
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    if ends is None:
        return []
    # A generation config may name one token or several.
    ends = ends if isinstance(ends, list) else [ends]
    if eos is not None and eos in ids and ends and ids[eos] not in ends:
        problem = f"stops at the tokens {ends} and its tokenizer's eos is {eos!r} ({ids[eos]})"
        return [Fault("eos-not-turn-end", str(folder), problem)]
    return []


def _turn_end(folder: Path, facts: Facts | None) -> list[Fault]:
    if template_text(folder) is None or (facts is not None and facts.turn_end):
        return []
    from jinja2 import TemplateError

    from align.models.pretrained import open_tokenizer
    from align.models.special_tokens import turn_end_token

    tokenizer = open_tokenizer(folder)
    try:
        end = turn_end_token(tokenizer)
    except TemplateError:  # it expects other roles; rendering the rows will show it
        return []
    if end is None or end == tokenizer.eos_token_id:
        return []
    token = tokenizer.convert_ids_to_tokens(end)
    problem = f"ends turns with {token!r}, and its eos is {tokenizer.eos_token!r}: answers would never stop"
    return [Fault("eos-not-turn-end", str(folder), problem)]
