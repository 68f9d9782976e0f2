"""Check a ``config.json`` before a library reads it: sizes, token ids, code and files that it names.

Only values that are wrong for every model are refused. transformers compares the sizes with the weights' shapes
(``pretrained.py``). Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.files import CONFIG, SINGLE, read_object, read_optional

COUNTS = (
    *("vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "n_inner", "max_position_embeddings", "n_positions"),
)
"""Fields of transformers' configs that count something; null means a default."""
LAYERS = ("num_hidden_layers", "n_layer")
LARGEST = {"vocab_size": 2**24, "max_position_embeddings": 2**31, "n_positions": 2**31}
LARGEST_COUNT = 2**20
"""Limit of every other count, above that of any model."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
FIX = "Fetch the model again, or correct the file."


def check_config(folder: Path, tensors: int) -> dict[str, Any]:
    """Return the folder's ``config.json`` after checking that it is possible and stays inside the folder.

    ``tensors`` is the number of tensors in the weights; each layer has at least one. Raises ``UserError`` that names
    the field.
    """
    file = folder / CONFIG
    config = read_object(file)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise UserError(f"{file}: has no model_type, so nothing says which model it is. {FIX}")
    _refuse_foreign(file, config)
    for name, part in _parts(config):
        _check_counts(file, name, part, tensors)
        _check_numbers(file, name, part)
    # Multimodal configs keep the sizes of the language model in text_config.
    text = config.get("text_config")
    sizes = config | text if isinstance(text, dict) else config
    check_token_ids(file, config, sizes.get("vocab_size"))
    _check_names(file, config)
    check_generation(folder, sizes.get("vocab_size"))
    return config


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the config and the configs of its parts, each after the prefix of its fields' names."""
    yield "", config
    for name, value in config.items():
        if name.endswith("_config") and isinstance(value, dict):
            yield f"{name}.", value


def _refuse_foreign(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse code from the Hub, weights under other names, and quantized weights."""
    for name in ATTENTION:
        if any("/" in str(word) for word in _values(config.get(name))):
            raise UserError(
                f"{file}: {name} is {config[name]!r}, code that would be fetched from the Hub and run. Remove the line."
            )
    named = config.get("transformers_weights")
    if named is not None and named != SINGLE:
        raise UserError(
            f"{file}: transformers_weights names {named!r}; weights are read from {SINGLE} or by its index. Rename the "
            "file and remove the line."
        )
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{file}: has a quantization_config, so its weights are quantized; align reads float weights. Name the "
            "model that it was quantized from."
        )


def _values(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value.values()) if isinstance(value, dict) else [value]


def _check_counts(file: Path, part: str, config: Mapping[str, Any], tensors: int) -> None:
    for name in COUNTS:
        value = config.get(name)
        if value is None or (isinstance(value, list) and value and all(_is_count(item, name) for item in value)):
            continue  # some models have a size for each layer
        if not _is_count(value, name):
            most = LARGEST.get(name, LARGEST_COUNT)
            raise UserError(f"{file}: {part}{name} is {_shown(value)}; expected a whole number from 1 to {most}. {FIX}")
        if name in LAYERS and not part and value > tensors:
            raise UserError(
                f"{file}: {name} is {value}, and the weights are {tensors} tensors, less than one for each layer. {FIX}"
            )
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and not config.get("head_dim") and hidden % heads:
        raise UserError(f"{file}: {part}hidden_size {hidden} is no multiple of {heads} num_attention_heads. {FIX}")


def _is_count(value: Any, name: str) -> bool:
    return type(value) is int and 1 <= value <= LARGEST.get(name, LARGEST_COUNT)


def _check_numbers(file: Path, part: str, config: Mapping[str, Any]) -> None:
    """Refuse NaN and infinity, which Python's ``json`` accepts."""
    for name, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{file}: {part}{name} is {value}; expected a finite number. {FIX}")


def _check_names(file: Path, config: Mapping[str, Any]) -> None:
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value is not None and str(value).removeprefix("torch.") not in DTYPES:
            raise UserError(f"{file}: {name} is {_shown(value)}; expected one of {', '.join(DTYPES)}. {FIX}")
    kinds = config.get("architectures")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise UserError(f"{file}: architectures is {_shown(kinds)}; expected a list of names. {FIX}")


def check_token_ids(file: Path, settings: Mapping[str, Any], vocabulary: Any) -> None:
    """Raise ``UserError`` for a special token's id that is outside the vocabulary."""
    for name in TOKENS:
        ids = settings.get(name)
        if ids is None:
            continue
        for token in ids if isinstance(ids, list) else [ids]:
            if type(token) is not int:
                raise UserError(f"{file}: {name} is {_shown(ids)}; expected a token's id or a list of them. {FIX}")
            # Llama's configs have had -1 for "no padding".
            lowest = -1 if name == "pad_token_id" else 0
            if token < lowest or (isinstance(vocabulary, int) and token >= vocabulary):
                raise UserError(f"{file}: {name} is {token}, outside the vocabulary of {vocabulary} tokens. {FIX}")


def check_generation(folder: Path, vocabulary: Any) -> None:
    """Raise ``UserError`` for a ``generation_config.json`` that is damaged or names impossible tokens or numbers."""
    file = folder / "generation_config.json"
    settings = read_optional(file)
    check_token_ids(file, settings, vocabulary)
    _check_numbers(file, "", settings)
    for name, least in (("temperature", 0), ("top_p", 0), ("top_k", 0), ("max_new_tokens", 1), ("max_length", 0)):
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < least):
            raise UserError(f"{file}: {name} is {_shown(value)}; expected a number of at least {least}. {FIX}")
    if settings.get("custom_generate") is not None:
        raise UserError(f"{file}: custom_generate names code that would be run. Remove the line.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
