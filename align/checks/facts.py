"""Faults of checkpoints, and the digests that find them. Torch-free.

A checkpoint's digests are written to ``model/align.json`` when it is finished and compared when it is used. The file is
copied with the folder, into other stores and out of them. The ``align.json`` of a bare adapter has the digest of its
base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.checks.weights import Tensor, read_tensors, tensor_digest, weights_digest
from align.config.runtime import FAULT_REMEDIES
from align.errors import UserError
from align.store.fingerprint import digest, file_digest
from align.store.json_files import write_text_atomically

FILE = "align.json"
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""Names of a reward model's score head in transformers."""
BASE = "base_weights"


@dataclass(frozen=True)
class Fault:
    """One fault of a checkpoint; ``place`` is a folder or a config field, ``problem`` continues the sentence."""

    name: str
    place: str
    problem: str

    def text(self) -> str:
        """Return one sentence with its remedy."""
        return f"{self.name}: {self.place} {self.problem}. {FAULT_REMEDIES[self.name]}"


def refuse(stage: str, faults: Iterable[Fault], waived: Iterable[str] = (), *, waivable: bool = True) -> None:
    """Raise ``UserError`` with every fault that is not ``waived``; with ``waivable`` the message shows how."""
    waived_names = set(waived)
    remaining = [fault for fault in faults if fault.name not in waived_names]
    if not remaining:
        return
    lines = [f"{stage}: its checkpoints cannot be used.", *(f"  {fault.text()}" for fault in remaining)]
    if waivable:
        names = ", ".join(dict.fromkeys(fault.name for fault in remaining))
        lines.append(f"An intended difference can be waived: `runtime: {{handover: {{waive: [{names}]}}}}`.")
    raise UserError("\n".join(lines))


@dataclass(frozen=True)
class Facts:
    """Digests are sha256 in hex; None if a folder has no such part."""

    stage: str
    """Kind of the stage that created it."""
    template: str | None
    """Digest of the chat template's text."""
    tokenizer: str | None
    """Digest of the tokenizer, without its padding and truncation settings."""
    vocabulary: str | None
    """Digest of the mapping of tokens to ids."""
    eos: str | None
    """The token that ends a turn."""
    pad: str | None
    head: str | None = None
    """Digest of a reward model's score head."""
    turn_end: bool = False
    """True once eos was verified to be the template's end of turn."""
    finite: bool = False
    """True once the weights were verified to have no NaN and no infinity."""
    accuracy: float | None = None
    """Accuracy of a reward model on held-out pairs as labeled."""
    pairs: int | None = None
    """Number of those pairs."""
    adapter_base: str | None = None
    """Digest of the weights below a stored adapter (``weights.weights_digest``)."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty for a missing file or other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_facts(folder: Path) -> Facts | None:
    """Return the recorded facts of a model folder; None if there are none, or if their fields are another version's."""
    stored = read_json(folder / FILE).get("handover")
    try:
        return Facts(**stored) if isinstance(stored, dict) else None
    except TypeError:
        return None


def write_facts(folder: Path, facts: Facts) -> None:
    """Add the facts to ``align.json``, keeping its other fields."""
    content = read_json(folder / FILE) | {"handover": asdict(facts)}
    write_text_atomically(folder / FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")


def template_text(folder: Path) -> str | None:
    """Return the saved chat template, from its own file or from a field of the tokenizer's config."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if not template:
        return None
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def special_token(folder: Path, name: str) -> str | None:
    """Return ``eos_token`` or ``pad_token`` of a tokenizer's config."""
    token = read_json(folder / "tokenizer_config.json").get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def token_ids(folder: Path) -> dict[str, int]:
    """Return every token with its id; empty for a tokenizer without ``tokenizer.json``."""
    tokenizer = read_json(folder / "tokenizer.json")
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in the order of their ids
        vocabulary = {str(piece[0]): index for index, piece in enumerate(vocabulary)}
    added = tokenizer.get("added_tokens") or []
    return vocabulary | {str(entry["content"]): int(entry["id"]) for entry in added}


def tokenizer_digest(folder: Path) -> str | None:
    """Return the digest of everything that decides how text is tokenized."""
    tokenizer = read_json(folder / "tokenizer.json")
    if not tokenizer:
        vocabulary_file = next(
            (folder / name for name in ("tokenizer.model", "vocab.txt") if (folder / name).is_file()), None
        )
        return None if vocabulary_file is None else file_digest(vocabulary_file)
    # Padding and truncation are set by whoever uses the tokenizer.
    fields = {name: value for name, value in tokenizer.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def head_of(tensors: dict[str, Tensor]) -> Tensor | None:
    """Return a reward model's score head."""
    return next((tensors[name] for name in HEADS if name in tensors), None)


def facts_of(
    folder: Path,
    stage: str,
    tensors: dict[str, Tensor],
    metrics: dict[str, Any],
    *,
    verified: bool,
    adapter_base: str | None = None,
) -> Facts:
    """Return the facts of a finished checkpoint; ``metrics`` are its stage's.

    ``verified`` is True for a checkpoint without faults. One with a waived fault is checked in full by each later
    stage, since a fault can hide others.
    """
    template = template_text(folder)
    ids = token_ids(folder)
    head = head_of(tensors)
    accuracy = metrics.get("test_accuracy_after")
    pairs = metrics.get("test_pairs")
    # Accuracy and pairs are facts of reward models only.
    scores = head is not None and isinstance(accuracy, (int, float)) and isinstance(pairs, int)
    return Facts(
        stage=stage,
        template=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        tokenizer=tokenizer_digest(folder),
        vocabulary=digest(ids) if ids else None,
        eos=special_token(folder, "eos_token"),
        pad=special_token(folder, "pad_token"),
        head=None if head is None else tensor_digest(head),
        turn_end=verified,
        finite=verified,
        accuracy=float(accuracy) if scores and accuracy is not None else None,
        pairs=int(pairs) if scores and pairs is not None else None,
        adapter_base=adapter_base,
    )


def write_base_digest(adapter: Path, base: Path) -> None:
    """Record the digest of the weights that an adapter was trained on in the adapter's folder."""
    content = read_json(adapter / FILE) | {BASE: weights_digest(read_tensors(base))}
    write_text_atomically(adapter / FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")


def has_base_digest(adapter: Path) -> bool:
    """Return True if the digest of the base is recorded."""
    return isinstance(read_json(adapter / FILE).get(BASE), str)


def check_base(adapter: Path, base: Path) -> list[Fault]:
    """Return the fault of merging an adapter onto other weights than it was trained on; none without a record."""
    recorded = read_json(adapter / FILE).get(BASE)
    if not isinstance(recorded, str) or weights_digest(read_tensors(base)) == recorded:
        return []
    return [Fault("adapter-base", str(adapter), f"was trained on other weights than those of {base}")]
