"""Write a transformers folder as one GGUF file, and read the file back.

Tensors are streamed, so one at a time is in memory. Reading back compares every tensor with the folder's weights,
within the rounding of its type, and writes a transformers folder with the file's weights, whose answers are then
compared with the checkpoint's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from align.errors import StageFailed, UserError
from align.extensions.formats.gguf_families import Family, add_metadata, check_config, find_family, rope_factors
from align.extensions.formats.gguf_tensors import Array, Entry, Kind, encode, largest_error, layout
from align.extensions.formats.gguf_tokenizer import (
    SpecialTokens,
    Vocabulary,
    add_tokenizer,
    read_special_tokens,
    read_vocabulary,
)

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

WEIGHTS = "*.safetensors"
ROPE_FREQS = "rope_freqs.weight"
"""Llama 3's divisors of rotary frequencies, which are no weight of the checkpoint."""
LARGEST_FLOAT16 = 65504.0
ROUGHEST = 0.2
"""Largest error of a tensor from llama-quantize, relative to its numbers (root mean squares)."""


class Weights:
    """The weights of a transformers folder, read one at a time. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: dict[str, Path] = {}
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Self:
        from safetensors import safe_open

        for file in sorted(self.folder.glob(WEIGHTS)):
            tensors = self._stack.enter_context(safe_open(file, framework="pt"))
            self._open[file] = tensors
            for name in tensors.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                self.files[name] = file
                self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def open_files(self) -> list[Path]:
        """The files, in order."""
        return list(self._open)

    def read(self, name: str) -> Array:
        """Return a weight in float32."""
        array: Array = self._open[self.files[name]].get_tensor(name).float().numpy()
        return array


@dataclass(frozen=True)
class Plan:
    """Contents of a GGUF file, known before it is written."""

    folder: Path
    family: Family
    config: Any
    kind: Kind
    vocabulary: Vocabulary
    special: SpecialTokens
    template: str
    entries: list[Entry]

    @property
    def ends(self) -> list[str]:
        """Texts of the tokens that end an answer."""
        return [self.vocabulary.tokens[token] for token in self.special.ends]


def plan_gguf(folder: Path, kind: Kind) -> Plan:
    """Return the contents of a GGUF file for a transformers folder.

    Raises ``UserError`` for a family, a config, a tokenizer or a weight that GGUF cannot hold.
    """
    from align.models.loading import load_tokenizer
    from align.models.pretrained import open_config

    config = open_config(folder)
    family = find_family(config.model_type, str(folder))
    check_config(family, config, str(folder))
    tokenizer = load_tokenizer(folder)
    template = tokenizer.chat_template
    with Weights(folder) as weights:
        shapes = dict(weights.shapes)
    if config.tie_word_embeddings:
        # llama.cpp uses the embeddings as the head if a file has no output tensor.
        shapes.pop("lm_head.weight", None)
    return Plan(
        folder,
        family,
        config,
        kind,
        read_vocabulary(tokenizer, config.vocab_size, str(folder)),
        read_special_tokens(tokenizer, folder),
        template if isinstance(template, str) else template["default"],
        layout(family, config, shapes, kind),
    )


def write_gguf(plan: Plan, path: Path, name: str) -> None:
    """Write the file. Raises ``UserError`` for a weight that is too large for float16."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    factors = rope_factors(plan.config)
    writer = GGUFWriter(path, plan.family.arch)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if plan.kind == "q8_0" else LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(2)
    add_metadata(writer, plan.family, plan.config)
    add_tokenizer(writer, plan.vocabulary, plan.special, plan.template)
    for entry in plan.entries:
        dtype = GGMLQuantizationType[entry.kind.upper()]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), _size(entry), dtype)
    if factors is not None:
        writer.add_tensor_info(ROPE_FREQS, [len(factors)], np.dtype(np.float32), 4 * len(factors))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Weights(plan.folder) as weights:
        for entry in plan.entries:
            array = entry.to_gguf([weights.read(source) for source in entry.sources])
            if entry.kind == "f16" and np.abs(array).max(initial=0) > LARGEST_FLOAT16:
                writer.close()
                raise UserError(
                    f"{entry.sources[0]} holds {np.abs(array).max():.3g}, and the largest number of float16 is "
                    f"{LARGEST_FLOAT16:g}. Use --gguf-type q8_0."
                )
            writer.write_tensor_data(encode(array, entry.kind))
    if factors is not None:
        writer.write_tensor_data(np.array(factors, dtype=np.float32))
    writer.close()


def _size(entry: Entry) -> int:
    """Return the bytes of a tensor: a block of Q8_0 has 32 numbers and a scale of two bytes."""
    count = int(np.prod(entry.shape))
    return {"f32": 4 * count, "f16": 2 * count, "q8_0": count // 32 * 34}[entry.kind]


def read_back(plan: Plan, path: Path, out: Path, is_requantized: bool = False) -> None:
    """Compare a file with its plan and the folder's weights; write a transformers folder with its weights to ``out``.

    Args:
        plan: What was to be written.
        path: The GGUF file.
        out: A new folder. It has the names, the shards and the other files of the plan's folder.
        is_requantized: True for a file of llama-quantize, whose types are not the plan's.

    Raises:
        StageFailed: For a difference beyond the rounding of a tensor's type, or other metadata.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    _compare_metadata(plan, reader, path)
    tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
    expected = {entry.name for entry in plan.entries}
    if tensors.keys() - {ROPE_FREQS} != expected:
        other = sorted((tensors.keys() - {ROPE_FREQS}) ^ expected)
        raise StageFailed(f"{path.name} holds other tensors than it should: {', '.join(other[:4])}.")
    out.mkdir(parents=True)
    for file in plan.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    with Weights(plan.folder) as weights:
        # A file is written as soon as all its weights are read, so not all weights are in memory.
        missing = {file: {name for name in weights.files if weights.files[name] == file} for file in weights.open_files}
        values: dict[Path, dict[str, Array]] = {file: {} for file in missing}
        for entry in sorted(plan.entries, key=lambda entry: weights.files[entry.sources[0]]):
            for name, array in _read_entry(entry, tensors[entry.name], weights, path, is_requantized).items():
                file = weights.files[name]
                values[file][name] = array
                missing[file].discard(name)
                if not missing[file]:
                    _save(values.pop(file), out / file.name)
        for file, rest in values.items():
            # A tied head is in the folder and not in GGUF.
            _save(rest, out / file.name)


def _save(values: Mapping[str, Array], file: Path) -> None:
    from safetensors.numpy import save_file

    save_file(dict(values), file, metadata={"format": "pt"})


def _read_entry(
    entry: Entry, tensor: ReaderTensor, weights: Weights, path: Path, is_requantized: bool
) -> dict[str, Array]:
    """Return the weights of a tensor, compared with the folder's."""
    from gguf import dequantize

    array = dequantize(tensor.data, tensor.tensor_type).reshape(entry.shape)
    expected = entry.to_gguf([weights.read(source) for source in entry.sources])
    error = np.abs(array - expected)
    if is_requantized:
        is_right = bool(np.linalg.norm(array - expected) <= ROUGHEST * np.linalg.norm(expected))
    else:
        is_right = bool((error <= largest_error(expected, entry.kind)).all())
    if not is_right:
        raise StageFailed(
            f"{path.name}: the tensor {entry.name} differs from {entry.sources[0]} by up to {error.max():.3g}, more "
            f"than {tensor.tensor_type.name} rounds."
        )
    return dict(zip(entry.sources, entry.from_gguf(array), strict=True))


def _compare_metadata(plan: Plan, reader: GGUFReader, path: Path) -> None:
    """Raise ``StageFailed`` if template, tokens or the tokens that end an answer are not the plan's."""
    special = plan.special
    expected = {
        "general.architecture": plan.family.arch,
        "tokenizer.chat_template": plan.template,
        "tokenizer.ggml.tokens": plan.vocabulary.tokens,
        "tokenizer.ggml.eos_token_id": special.ends[0],
        "tokenizer.ggml.add_bos_token": special.adds_bos,
    }
    for key, token in zip(("eot", "eom"), special.ends[1:], strict=False):
        expected[f"tokenizer.ggml.{key}_token_id"] = token
    for key, value in expected.items():
        field = reader.get_field(key)
        if field is None or field.contents() != value:
            raise StageFailed(f"{path.name}: {key} is not what was written.")
