"""What a checkpoint is, in digests: written into ``model/align.json`` when it is made, compared when it is used.

The file travels with the folder, into other stores and out of them. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.checks.weights import Tensor, tensor_digest
from align.store.fingerprint import digest, file_digest

FILE = "align.json"
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""Names of a reward model's score head in transformers."""


@dataclass(frozen=True)
class Facts:
    """Digests are sha256 in hex; None for what a folder does not have."""

    stage: str
    """Kind of the stage that made it."""
    template: str | None
    """Of the chat template's text."""
    tokenizer: str | None
    """Of the tokenizer, without what only concerns padding and truncation."""
    vocabulary: str | None
    """Of the mapping of tokens to ids alone."""
    eos: str | None
    """The token that ends a turn."""
    pad: str | None
    head: str | None = None
    """Of a reward model's score head."""
    turn_end: bool = False
    """Whether eos was found to be the template's end of turn."""
    accuracy: float | None = None
    """Of a reward model, on held-out pairs as labeled."""
    pairs: int | None = None
    """How many those were."""
    adapter_base: str | None = None
    """Of the weights beneath an adapter that lies beside them (``weights.weights_digest``)."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file or it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_facts(folder: Path) -> Facts | None:
    """What was written down about a model folder; None where nothing was, or by an align that knew other facts."""
    found = read_json(folder / FILE).get("handover")
    try:
        return Facts(**found) if isinstance(found, dict) else None
    except TypeError:
        return None


def write_facts(folder: Path, facts: Facts) -> None:
    """Add the facts to ``align.json``; what else stands there is kept."""
    whole = read_json(folder / FILE) | {"handover": asdict(facts)}
    (folder / FILE).write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def template_text(folder: Path) -> str | None:
    """The chat template as saved: a file of its own, or a field of the tokenizer's config."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    return None if not found else found if isinstance(found, str) else json.dumps(found, sort_keys=True)


def special_token(folder: Path, name: str) -> str | None:
    """``eos_token`` or ``pad_token`` of a tokenizer's config."""
    found = read_json(folder / "tokenizer_config.json").get(name)
    if isinstance(found, dict):
        found = found.get("content")
    return found if isinstance(found, str) else None


def token_ids(folder: Path) -> dict[str, int]:
    """Every token and its id; empty for a tokenizer that is no ``tokenizer.json``."""
    tokenizer = read_json(folder / "tokenizer.json")
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in the order of their ids
        vocabulary = {str(piece[0]): at for at, piece in enumerate(vocabulary)}
    return vocabulary | {str(one["content"]): int(one["id"]) for one in tokenizer.get("added_tokens") or []}


def tokenizer_digest(folder: Path) -> str | None:
    """Of all that decides which tokens a text becomes."""
    tokenizer = read_json(folder / "tokenizer.json")
    if not tokenizer:
        plain = next((folder / name for name in ("tokenizer.model", "vocab.txt") if (folder / name).is_file()), None)
        return None if plain is None else file_digest(plain)
    kept = {name: value for name, value in tokenizer.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def head_of(tensors: dict[str, Tensor]) -> Tensor | None:
    """A reward model's score head."""
    return next((tensors[name] for name in HEADS if name in tensors), None)


def facts_of(
    folder: Path, stage: str, tensors: dict[str, Tensor], metrics: dict[str, Any], adapter_base: str | None = None
) -> Facts:
    """Of a finished checkpoint, whose folder has been looked at without a fault; ``metrics`` are its stage's."""
    template, ids = template_text(folder), token_ids(folder)
    head = head_of(tensors)
    accuracy, pairs = metrics.get("test_accuracy_after"), metrics.get("test_pairs")
    scores = head is not None and isinstance(accuracy, (int, float)) and isinstance(pairs, int)
    return Facts(
        stage=stage,
        template=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        tokenizer=tokenizer_digest(folder),
        vocabulary=digest(ids) if ids else None,
        eos=special_token(folder, "eos_token"),
        pad=special_token(folder, "pad_token"),
        head=None if head is None else tensor_digest(head),
        turn_end=True,
        accuracy=float(accuracy) if scores and accuracy is not None else None,
        pairs=int(pairs) if scores and pairs is not None else None,
        adapter_base=adapter_base,
    )
