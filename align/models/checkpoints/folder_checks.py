"""Check a model folder, an adapter's folder or a GGUF file before any library reads it. Torch-free and fast.

Reads JSON files and the headers of weights, no tensor. Excluded: comparing the weights' shapes with the config, which
needs transformers (``pretrained.py``).

Only values that are wrong for every model are refused. transformers compares the sizes with the weights' shapes
(``pretrained.py``). Torch-free.

Excluded: chat templates (``chat_template.py``), and the choice of eos and pad (``special_tokens.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from align.errors import UserError, with_article
from align.models.checkpoints.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    SINGLE,
    UNQUANTIZED,
    BadHeader,
    Entry,
    files_read,
    read_gguf_header,
    read_header,
    read_object,
    read_optional,
    refuse_links,
    refuse_quantized,
    weight_files,
)

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
ADAPTER_CODE = (
    *("adapters", "cache_file", "corda_config", "covariance_file", "lora_ga_config", "megatron_config"),
    *("prompt_tuning_init_state_dict_path", "shadow_model", "tokenizer_name_or_path"),
)
"""Fields of an ``adapter_config.json`` by which peft imports modules or opens other files and folders."""
BUILT = "mirror"
"""Value of ``shadow_model`` for which peft builds a model and opens none."""
MIXTURE = "XLORA"
"""peft's type that loads other adapters, pickled ones as well, from its own folders."""


def check_folder(folder: Path) -> None:
    """Raise ``UserError`` for a model folder with a file that is damaged, hostile or another model's.

    The result is cached in the process until a file changes.
    """
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"{folder}: holds an adapter without its base model. A `model` stage merges it: `source: {folder}`."
            )
        raise UserError(f"{folder}: holds no {CONFIG}, so it is no transformers model folder. Name one that is.")
    # Names, sizes, times and inodes of all files: the cache key of the check.
    signature = tuple((name, *_state(file)) for name, file in files_read(folder).items())
    _check(folder, signature)


def _state(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


@lru_cache(maxsize=256)
def _check(folder: Path, signature: tuple[Any, ...]) -> None:
    refuse_links(folder)
    entries = tensor_entries(folder)
    check_config(folder, len(entries))
    embeddings = [entry for name, entry in entries.items() if name.endswith(EMBEDDINGS)]
    rows = next((entry.shape[0] for entry in embeddings if entry.shape), None)
    check_tokenizer(folder, rows)


def tensor_entries(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a model folder by name, from the headers. Raises ``UserError`` for a damaged file."""
    entries: dict[str, Entry] = {}
    for file in weight_files(folder):
        try:
            header = read_header(file)
        except (BadHeader, OSError) as error:
            raise UserError(f"{file}: {error}. Fetch the model again.") from None
        twice = sorted(entries.keys() & header.keys())
        if twice:
            raise UserError(f"{file}: holds {twice[0]}, which another file of the model holds as well.")
        entries |= header
    weights = [entry for name, entry in entries.items() if name.endswith("weight")]
    quantized = next((entry for entry in weights if entry.dtype not in FLOATS), None)
    if quantized is not None:
        raise UserError(f"{folder}: the tensor {quantized.name} is quantized ({quantized.dtype}). {UNQUANTIZED}")
    return entries


def check_adapter(adapter: Path) -> None:
    """Raise ``UserError`` for an adapter's folder that is damaged, or that makes peft import or open other files."""
    file = adapter / ADAPTER_CONFIG
    refuse_links(adapter)
    settings = read_object(file)
    if settings.get("peft_type") == MIXTURE:
        raise UserError(
            f"{file}: peft_type {MIXTURE} loads adapters of other folders, which is not done here. Name one."
        )
    for name in ADAPTER_CODE:
        if settings.get(name) not in (None, "", BUILT, [], {}):
            raise UserError(f"{file}: {name} names code or files to load, which is not done here. Remove the line.")
    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = " and only pickled weights, which run code when opened" if list(adapter.glob("*.bin")) else ""
        raise UserError(f"{adapter}: holds no {weights.name}{pickled}. Save the adapter again with peft.")
    try:
        read_header(weights)
    except BadHeader as error:
        raise UserError(f"{weights}: {error}. Fetch the adapter again.") from None


def check_gguf(gguf: Path) -> None:
    """Raise ``UserError`` for a file that is not a GGUF, or whose header cannot be true of its size.

    Checked are types, shapes and places of all tensors, and the model's sizes in the fields.
    """
    try:
        fields, tensors = read_gguf_header(gguf)
        _check_gguf_sizes(fields, tensors)
    except BadHeader as error:
        raise UserError(f"{gguf}: {error}. Fetch it again.") from None


GGUF_SIZES = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")
"""Fields behind the name of the architecture that count something."""
GGUF_EMBEDDING = "token_embd.weight"


def _check_gguf_sizes(fields: Mapping[str, Any], tensors: Mapping[str, Entry]) -> None:
    """Raise ``BadHeader`` for sizes of a model that its tensors contradict."""
    arch = fields.get("general.architecture")
    if not isinstance(arch, str):
        raise BadHeader("has no general.architecture in its header")
    sizes = {name: fields.get(f"{arch}.{name}") for name in GGUF_SIZES}
    for name, value in sizes.items():
        if value is not None and not (type(value) is int and 0 < value < LARGEST_GGUF):
            raise BadHeader(f"has {arch}.{name} {value!r}, which no model has")
    layers = sizes["block_count"]
    if layers is not None and layers > len(tensors):
        raise BadHeader(f"has {arch}.block_count {layers} and only {len(tensors)} tensors")
    embedding, width = tensors.get(GGUF_EMBEDDING), sizes["embedding_length"]
    if embedding is not None and width is not None and embedding.shape[0] != width:
        raise BadHeader(f"has {arch}.embedding_length {width} and {GGUF_EMBEDDING} of shape {list(embedding.shape)}")


COUNTS = (
    *("vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "n_inner", "max_position_embeddings", "n_positions"),
)
"""Fields of transformers' configs that count something; null means a default."""
LAYERS = ("num_hidden_layers", "n_layer")
LARGEST_GGUF = 2**31
LARGEST = {"vocab_size": 2**24, "max_position_embeddings": 2**31, "n_positions": 2**31}
LARGEST_COUNT = 2**20
"""Limit of every other count, above the count of any model."""
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


def _refuse_foreign(file: Path, config: dict[str, Any]) -> None:
    """Refuse code from the Hub, weights under other names, and quantized weights."""
    for name in ATTENTION:
        if any("/" in str(word) for word in _values(config.get(name))):
            raise UserError(
                f"{file}: {name} is {config[name]!r}, code that would be fetched from the Hub and run. Remove the line."
            )
    file_name = config.get("transformers_weights")
    if file_name is not None and file_name != SINGLE:
        raise UserError(
            f"{file}: transformers_weights is {file_name!r}, but only {SINGLE} or its index is read. Rename the file."
        )
    refuse_quantized(file, config)


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
    hidden = config.get("hidden_size")
    heads = config.get("num_attention_heads")
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


TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
PLAIN = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""Vocabulary files that transformers reads without a ``tokenizer.json``."""
NAMES = ("tokenizer_class", "eos_token", "pad_token", "bos_token", "unk_token")
"""Fields of ``tokenizer_config.json`` that are text; a token may be an object with its text in ``content``."""


def check_tokenizer(folder: Path, rows: int | None) -> None:
    """Raise ``UserError`` for tokenizer files that are damaged or belong to another model.

    ``rows`` is the number of tokens that the model embeds; None if it is not known.
    """
    file = folder / TOKENIZER
    _check_settings(folder)
    if not file.exists():
        if not any((folder / name).is_file() for name in PLAIN) and not list(folder.glob("*.tiktoken")):
            raise UserError(f"{folder}: holds no {TOKENIZER} and no other vocabulary. Fetch the missing file.")
        return
    ids = token_ids(file)
    highest = max(ids.values(), default=-1)
    if rows is not None and highest >= rows:
        raise UserError(
            f"{file}: has a token of the id {highest}, but the model embeds {rows} tokens. Fetch the model's own."
        )


def require_embeddings(tokenizer: Any, model: Any, place: str, remedy: str) -> None:
    """Raise ``UserError`` for a tokenizer with more tokens than ``model`` embeds; ``remedy`` ends the message."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"{place}: the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}; {remedy}")


def require_same_vocabulary(first: Any, second: Any, names: tuple[str, str], remedy: str) -> None:
    """Raise ``UserError`` unless two tokenizers give every token the same id; ``remedy`` ends the message."""
    if first.get_vocab() != second.get_vocab():
        raise UserError(
            f"{names[0]} and {names[1]} have different vocabularies ({len(first)} and {len(second)} tokens); {remedy}"
        )


def _check_settings(folder: Path) -> None:
    file = folder / SETTINGS
    settings = read_optional(file)
    template = settings.get("chat_template")
    # transformers also accepts a list of named templates.
    are_named_templates = isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("template"), str) and isinstance(entry.get("name"), str)
        for entry in template
    )
    if template is not None and not isinstance(template, str | dict) and not are_named_templates:
        raise UserError(f"{file}: chat_template is {with_article(type(template).__name__)}; expected text. {FIX}")
    for name in NAMES:
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if content is not None and not isinstance(content, str):
            raise UserError(f"{file}: {name} is {content!r}; expected text. {FIX}")
    versions = settings.get("fast_tokenizer_files") or []
    if not isinstance(versions, list) or any(name != Path(str(name)).name for name in versions):
        raise UserError(f"{file}: fast_tokenizer_files names {versions}; only files of the folder are read. {FIX}")
    for path in [folder / TEMPLATE, *sorted((folder / "additional_chat_templates").glob("*.jinja"))]:
        _check_text(path)


def _check_text(file: Path) -> None:
    if not file.exists():
        return
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as text ({error}). {FIX}") from None
    if not text.strip():
        raise UserError(f"{file}: is empty. {FIX}")


def token_ids(file: Path) -> dict[str, int]:
    """Return every token of a ``tokenizer.json`` with its id. Raises ``UserError`` for a damaged file."""
    content = read_object(file)
    model = content.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{file}: has no 'model' that holds a vocabulary. {FIX}")
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in the order of their ids
        pieces = [piece for piece in vocabulary if isinstance(piece, list) and piece]
        vocabulary = {str(piece[0]): index for index, piece in enumerate(pieces)}
    added = content.get("added_tokens") or []
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise UserError(f"{file}: its vocabulary is no mapping of tokens to ids. {FIX}")
    try:
        ids = vocabulary | {entry["content"]: entry["id"] for entry in added}
    except (KeyError, TypeError):
        raise UserError(f"{file}: added_tokens holds an entry without content and id. {FIX}") from None
    invalid = next((token for token, index in ids.items() if type(index) is not int or index < 0), None)
    if invalid is not None:
        raise UserError(
            f"{file}: the token {invalid!r} has the id {ids[invalid]!r}; expected a whole number from 0. {FIX}"
        )
    return ids
