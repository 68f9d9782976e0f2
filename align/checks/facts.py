"""Faults of checkpoints, and the digests of weights, templates and tokenizers that find them. Torch-free.

A checkpoint's digests are written to ``model/align.json`` when it is finished and compared when it is used. The file is
copied with the folder, into other stores and out of them. The ``align.json`` of a bare adapter has the digest of its
base. Weights are safetensors files, whose headers ``align.models.checkpoints.files`` reads; pickled weights are refused
elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.config.runtime import FAULT_REMEDIES
from align.errors import UserError
from align.models.chat.template_settings import THOUGHT_ROWS
from align.models.checkpoints.files import BadHeader, read_header
from align.store.fingerprint import digest, file_digest
from align.store.json_files import write_text_atomically

FILE = "align.json"
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""Names of a reward model's score head in transformers."""
BASE = "base_weights"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
"""End of the output head's name."""
CHUNK = 1 << 22
"""Values per read."""
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes per value of the types that weights may have."""
EXPONENTS = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""Bits that are all set in NaN and in infinity, and in no other number."""


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
    thoughts: bool | None = None
    """True if the model was trained on answers with thoughts, False if on answers without them; None if neither."""
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
    thoughts: bool | None = None,
    adapter_base: str | None = None,
) -> Facts:
    """Return the facts of a finished checkpoint; ``metrics`` are its stage's, ``thoughts`` those of its source.

    ``verified`` is True for a checkpoint without faults. A checkpoint with a waived fault is checked in full by each
    later stage, since a fault can hide others.
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
        thoughts=metrics[THOUGHT_ROWS] > 0 if THOUGHT_ROWS in metrics else thoughts,
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


class Damaged(ValueError):
    """Files that cannot be read as weights; the message continues a sentence that starts with the folder."""


@dataclass(frozen=True)
class Tensor:
    """Location of one tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def chunks(self) -> Iterator[NDArray[Any]]:
        """Yield the values' bits, as unsigned integers of the type's width."""
        if self.size:
            kind = np.dtype(f"<u{WIDTHS[self.dtype]}")
            bits = np.memmap(self.file, dtype=kind, mode="r", offset=self.start, shape=(self.size,))
            for start in range(0, self.size, CHUNK):
                yield bits[start : start + CHUNK]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a model folder, from the headers. Raises ``Damaged`` for missing or truncated files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Damaged("holds no safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read(file)
    index = folder / INDEX
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise Damaged(f"has an index that cannot be read ({INDEX})") from None
        missing = sorted(set(listed) - set(tensors))
        if missing:
            raise Damaged(f"lacks {len(missing)} of {len(listed)} tensors of its index, {missing[0]} among them")
    return tensors


def _read(file: Path) -> dict[str, Tensor]:
    try:
        entries = read_header(file)
    except BadHeader as error:
        raise Damaged(f"has a file, {file.name}, that {error}") from None
    return {name: Tensor(name, entry.dtype, entry.shape, file, entry.start) for name, entry in entries.items()}


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinity, or None. Types other than floats are skipped."""
    for tensor in tensors.values():
        exponent = EXPONENTS.get(tensor.dtype)
        if exponent is not None and any(bool(((bits & exponent) == exponent).any()) for bits in tensor.chunks()):
            return tensor.name
    return None


def all_zero(tensor: Tensor) -> bool:
    """Return True if every value is 0 (or -0)."""
    # All bits but the sign are 0 in 0 and in -0.
    sign = 1 << (8 * WIDTHS[tensor.dtype] - 1)
    return not any(bool((bits & (sign - 1)).any()) for bits in tensor.chunks())


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's type, shape and bytes."""
    hasher = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
    for bits in tensor.chunks():
        hasher.update(bits.tobytes())
    return hasher.hexdigest()


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of a model's weights rounded to bfloat16; a checkpoint and its bfloat16 copy have the same.

    An output head that repeats the embeddings is skipped: some folders store it and some do not.
    """
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        # Types other than floats, such as buffers of indices, are not weights.
        if tensor.dtype not in WIDTHS or (name.endswith(HEAD) and _repeats_another(tensor, tensors)):
            continue
        hasher.update(f"{name} {tensor.shape}\n".encode())
        for bits in tensor.chunks():
            hasher.update(_rounded(bits, tensor.dtype).tobytes())
    return hasher.hexdigest()


def _repeats_another(head: Tensor, tensors: dict[str, Tensor]) -> bool:
    """Return True if another matrix, such as the embeddings, has the values of ``head`` in bfloat16."""
    alike = [tensor for tensor in tensors.values() if tensor.shape == head.shape and tensor.dtype in WIDTHS]
    return any(
        all(
            np.array_equal(_rounded(ours, head.dtype), _rounded(theirs, tensor.dtype))
            for ours, theirs in zip(head.chunks(), tensor.chunks(), strict=True)
        )
        for tensor in alike
        if tensor.name != head.name
    )


def _rounded(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Round to bfloat16, ties to even, and return the bits."""
    if dtype == "BF16":
        return bits
    if dtype != "F32":
        kind = np.float64 if dtype == "F64" else np.float16
        bits = bits.view(kind).astype(np.float32).view(np.uint32)
    # Add half of the last kept bit, and one more if that bit is odd, then cut: ties go to even. In place, because
    # passes over memory are all that this costs; a carry out of the 32 bits is cut with the rest.
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    return rounded.astype("<u2")
