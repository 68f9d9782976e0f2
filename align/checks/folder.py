"""One model folder looked at: weights, vocabulary, head, template and special tokens. Torch-free until the last look.

That last one, whether the template ends a turn with eos, renders a conversation with transformers' tokenizer; it is
left out where ``align.json`` says that it was done for this very template and tokenizer.
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
"""Folder inside a model folder, of an adapter that is no change of weights and works on the ones beside it."""


def look(folder: Path, reward: bool, *, values: bool = True) -> list[Fault]:
    """Every fault of a checkpoint's folder; ``reward`` says what it should be.

    ``values`` reads all weights for NaN and infinity, about two seconds a GiB; without it only headers are read.
    """
    place = str(folder)
    try:
        tensors = read_tensors(folder)
    except Damaged as error:
        return [Fault("weights-truncated", place, str(error))]
    config = read_json(folder / "config.json")
    if not config:
        return [Fault("weights-truncated", place, "has no config.json that can be read")]
    other = _kind(place, config, reward)
    if other:
        return other
    facts = read_facts(folder)
    faults = [
        *_values(place, tensors, values),
        *_vocabulary(folder, config, tensors),
        *(_head(place, tensors, facts) if reward else []),
        *_adapter(folder, tensors, facts),
        *_changes(folder, facts),
        *_special_tokens(folder),
    ]
    if not any(fault.name in ("pad-is-eos", "template-changed", "tokenizer-changed") for fault in faults):
        faults += _turn_end(folder, facts)
    return faults


def _kind(place: str, config: dict[str, Any], reward: bool) -> list[Fault]:
    kinds = [str(kind) for kind in config.get("architectures") or []]
    if not kinds:
        return []
    scores = any(kind.endswith("ForSequenceClassification") for kind in kinds)
    if scores != reward:
        wanted = "a reward model" if reward else "a model that writes"
        return [Fault("wrong-kind", place, f"should be {wanted} and its config says {kinds[0]}")]
    labels = len(config.get("id2label") or {}) or 1
    if reward and labels != 1:
        return [Fault("wrong-kind", place, f"is a classifier with {labels} labels, where a reward model has one score")]
    return []


def _values(place: str, tensors: dict[str, Tensor], values: bool) -> list[Fault]:
    odd = next((tensor for tensor in tensors.values() if tensor.dtype not in WIDTHS and tensor.size > 1), None)
    if odd is not None:
        return [Fault("weights-dtype", place, f"has the tensor {odd.name} of type {odd.dtype}")]
    bad = not_finite(tensors) if values else None
    return [] if bad is None else [Fault("weights-not-finite", place, f"has NaN or infinity in {bad}")]


def _vocabulary(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> list[Fault]:
    ids = token_ids(folder)
    tokens = max(ids.values()) + 1 if ids else 0
    named = [tensor for name, tensor in tensors.items() if name.endswith((*EMBEDDINGS, HEAD))]
    said = (config.get("text_config") or config).get("vocab_size")
    for tensor in named:
        if tokens > tensor.shape[0]:
            what = f"has a tokenizer of {tokens} tokens and {tensor.shape[0]} rows in {tensor.name}"
            return [Fault("vocabulary-size", str(folder), what)]
        if isinstance(said, int) and said != tensor.shape[0]:
            what = f"has {tensor.shape[0]} rows in {tensor.name} and a vocab_size of {said} in its config"
            return [Fault("vocabulary-size", str(folder), what)]
    return []


def _head(place: str, tensors: dict[str, Tensor], facts: Facts | None) -> list[Fault]:
    head = head_of(tensors)
    if head is None:
        return [Fault("score-head", place, "has no score head, and a random one would be put there")]
    if head.dtype in WIDTHS and all_zero(head):
        return [Fault("score-head", place, f"has a score head of zeros ({head.name}): it was never trained")]
    if facts is not None and facts.head is not None and tensor_digest(head) != facts.head:
        return [Fault("score-head", place, "has another score head than the one that was trained: it was drawn anew")]
    return []


def _adapter(folder: Path, tensors: dict[str, Tensor], facts: Facts | None) -> list[Fault]:
    """An adapter inside the folder is whole, and works on the weights beside it and on no others."""
    if not (folder / ADAPTER).is_dir():
        return []
    try:
        bad = not_finite(read_tensors(folder / ADAPTER))
    except Damaged as error:
        return [Fault("weights-truncated", str(folder / ADAPTER), str(error))]
    if bad is not None:
        return [Fault("weights-not-finite", str(folder / ADAPTER), f"has NaN or infinity in {bad}")]
    if facts is None or facts.adapter_base is None:
        return []
    if weights_digest(tensors) == facts.adapter_base:
        return []
    return [Fault("adapter-base", str(folder / ADAPTER), "was trained on other weights than those beside it")]


def _changes(folder: Path, facts: Facts | None) -> list[Fault]:
    if facts is None:
        return []
    found: list[Fault] = []
    text = template_text(folder)
    if facts.template is not None and (text is None or hashlib.sha256(text.encode()).hexdigest() != facts.template):
        found.append(Fault("template-changed", str(folder), "has another chat template than it was trained with"))
    if facts.tokenizer is not None and tokenizer_digest(folder) != facts.tokenizer:
        found.append(Fault("tokenizer-changed", str(folder), "has another tokenizer than it was trained with"))
    for name, was in (("eos_token", facts.eos), ("pad_token", facts.pad)):
        now = special_token(folder, name)
        if now != was:
            found.append(Fault("tokenizer-changed", str(folder), f"has {name} {now!r}; it was trained with {was!r}"))
    return found


def _special_tokens(folder: Path) -> list[Fault]:
    pad, eos = special_token(folder, "pad_token"), special_token(folder, "eos_token")
    if pad is not None and pad == eos:
        what = f"pads with its end of turn, {eos!r}: masked as padding, the end of an answer is never learned"
        return [Fault("pad-is-eos", str(folder), what)]
    ids = token_ids(folder)
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if eos is not None and eos in ids and ends and ids[eos] not in ends:
        what = f"stops at the tokens {ends} and its tokenizer's eos is {eos!r} ({ids[eos]})"
        return [Fault("eos-not-turn-end", str(folder), what)]
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
    except TemplateError:  # it takes other roles; the rows themselves will show
        return []
    if end is None or end == tokenizer.eos_token_id:
        return []
    token = tokenizer.convert_ids_to_tokens(end)
    what = f"ends turns with {token!r}, and its eos is {tokenizer.eos_token!r}: answers would never stop"
    return [Fault("eos-not-turn-end", str(folder), what)]
