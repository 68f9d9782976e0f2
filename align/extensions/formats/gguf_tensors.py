"""The tensors of a GGUF file: which weights of a transformers folder each holds, and both directions of its change.

``layout`` describes a file before it is written. ``Entry.to_gguf`` and ``Entry.from_gguf`` are inverse, so a file can
be read back and compared with the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from align.errors import UserError
from align.extensions.formats.gguf_families import Family

Array = npt.NDArray[Any]
EXPERT = re.compile(r"(?P<before>.*)\.experts\.(?P<number>\d+)\.(?P<matrix>[^.]+)\.weight")
SUFFIXES = (".weight", ".bias")
KEPT = ("ffn_gate_inp", "position_embd")
"""Matrices that llama.cpp reads in float32 only: routers and learned positions."""
BLOCK = 32
"""Numbers of a row that share one scale in Q8_0."""

Kind = Literal["f32", "f16", "q8_0"]


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    name: str
    sources: tuple[str, ...]
    """Names of the weights in transformers; several for a mixture's experts."""
    shape: tuple[int, ...]
    """Shape in numpy's order, the last dimension of a row last."""
    kind: Kind
    heads: int = 0
    """Number of heads whose rows are reordered for rotary positions; 0 for no reordering."""
    is_shifted: bool = False
    is_transposed: bool = False

    def to_gguf(self, weights: Sequence[Array]) -> Array:
        """Return the tensor of the file, in float32, for the weights of ``sources``."""
        array = np.stack(weights) if len(weights) > 1 else weights[0]
        if self.is_transposed:
            array = array.T
        if self.heads:
            halves = array.reshape(self.heads, 2, array.shape[0] // self.heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if self.is_shifted:
            array = array + 1
        return np.ascontiguousarray(array, dtype=np.float32)

    def from_gguf(self, array: Array) -> list[Array]:
        """Return the weights of ``sources`` for the dequantized tensor of the file."""
        array = array.reshape(self.shape)
        if self.is_shifted:
            array = array - 1
        if self.heads:
            pairs = array.reshape(self.heads, array.shape[0] // self.heads // 2, 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        if self.is_transposed:
            array = array.T
        parts = array if len(self.sources) > 1 else [array]
        return [np.ascontiguousarray(part, dtype=np.float32) for part in parts]


@dataclass
class _Experts:
    """Matrices of the same name of all experts of a layer."""

    names: dict[int, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()


def layout(family: Family, config: Any, shapes: dict[str, tuple[int, ...]], kind: Kind) -> list[Entry]:
    """Return the tensors of the file for the weights of a folder.

    Args:
        shapes: Shape of each weight in the folder's safetensors.
        kind: Type of the matrices. Norms, biases, routers and learned positions stay float32.

    Raises:
        UserError: If a weight has no place in GGUF.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    experts: dict[str, _Experts] = {}
    entries = []
    for name, shape in shapes.items():
        match = EXPERT.fullmatch(name)
        if match is not None and family.has_experts:
            merged = f"{match['before']}.experts.{match['matrix']}.weight"
            group = experts.setdefault(merged, _Experts())
            group.names[int(match["number"])] = name
            group.shape = shape
            continue
        entries.append(_entry(family, config, names.get_name(name, SUFFIXES), (name,), shape, kind))
    for merged, group in experts.items():
        # The map knows Mixtral's experts by their original names.
        key = merged.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        target = names.get_name(merged, SUFFIXES) or names.get_name(key, SUFFIXES)
        ordered = tuple(group.names[number] for number in sorted(group.names))
        entries.append(_entry(family, config, target, ordered, (len(ordered), *group.shape), kind))
    return entries


def _entry(
    family: Family, config: Any, target: str | None, sources: tuple[str, ...], shape: tuple[int, ...], kind: Kind
) -> Entry:
    name = sources[0]
    if target is None:
        raise UserError(
            f"the weight {name} has no place in a GGUF file of the architecture {family.arch}. Use --format "
            "transformers."
        )
    # Mixtral's map gives a router's name without the ending.
    target = target if target.endswith(SUFFIXES) else f"{target}.weight"
    is_transposed = name.endswith(family.transposes) if family.transposes else False
    is_vector = len(shape) == 1 or target.endswith("_norm.weight") or target.split(".")[-2] in KEPT
    if is_transposed:
        shape = shape[::-1]
    # A row that is not a whole number of blocks cannot be quantized.
    if kind == "q8_0" and shape[-1] % BLOCK:
        kind = "f16"
    heads = 0
    if family.rotates_pairs and name.endswith(("q_proj.weight", "q_proj.bias")):
        heads = config.num_attention_heads
    if family.rotates_pairs and name.endswith(("k_proj.weight", "k_proj.bias")):
        heads = config.num_key_value_heads
    is_shifted = family.shifts_norms and name.endswith("norm.weight")
    return Entry(target, sources, shape, "f32" if is_vector else kind, heads, is_shifted, is_transposed)


def encode(array: Array, kind: Kind) -> Array:
    """Return a float32 tensor as the bytes of its type."""
    from gguf import GGMLQuantizationType, quants

    if kind == "q8_0":
        return quants.quantize(array, GGMLQuantizationType.Q8_0)
    return array.astype(np.float16 if kind == "f16" else np.float32)


def largest_error(array: Array, kind: Kind) -> Array:
    """Return the largest rounding error that a type allows each number of a tensor, as the file holds it.

    A number that float16 holds is exact. Q8_0 rounds to multiples of a scale, 1/127 of the largest number of its
    block, and rounds the scale to float16 (11 bits): at most 1/2 + 127/2048 of a scale. Float32 has the error of adding
    1 to a norm.
    """
    if kind == "q8_0":
        blocks = np.abs(array).reshape(*array.shape[:-1], -1, BLOCK)
        scale = np.repeat(blocks.max(axis=-1), BLOCK, axis=-1).reshape(array.shape) / 127
        # Scales below the smallest normal number of float16 have fewer bits.
        return np.asarray(scale * (0.5 + 127 / 2048) + 127 * 2.0**-25)
    if kind == "f16":
        return np.asarray(np.abs(array.astype(np.float16).astype(np.float32) - array))
    return np.asarray(2.0**-23 * (1 + np.abs(array)))
