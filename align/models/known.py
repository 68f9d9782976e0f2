"""Look up the sizes of a base model from what is on this machine. Fetches nothing and never imports torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from align.models.architecture import Architecture, UnknownArchitecture, architecture_of, read_architecture
from align.models.files import CONFIG, read_optional
from align.models.source import Origin, resolve
from align.models.tiny import MAX_POSITIONS

EMBEDDED_SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""Sizes of SmolLM2-135M, known before it is fetched."""

TINY_SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 260,
    "tie_word_embeddings": True,
}
"""Sizes of ``make_tiny``'s default model."""


def known_architecture(source: str, revision: str | None, base: Path) -> Architecture:
    """Return the architecture of a model stage's ``source``.

    Raises ``UnknownArchitecture``, which names the command that makes it known.
    """
    origin = resolve(source, revision, base)
    if origin.origin is Origin.EMBEDDED:
        return architecture_of(EMBEDDED_SIZES)
    if origin.origin is Origin.TINY:
        return architecture_of(TINY_SIZES)
    if origin.origin is Origin.FOLDER and origin.path is not None:
        return read_architecture(origin.path / "config.json")
    if origin.origin is Origin.ADAPTER:
        raise UnknownArchitecture(f"'{source}' is an adapter; its base has the sizes")
    if origin.origin is Origin.GGUF:
        raise UnknownArchitecture(f"'{source}' has no config.json before its model stage has run")
    return read_architecture(_cached(origin.name, origin.revision))


def known_positions(source: str, revision: str | None, base: Path) -> int | None:
    """Return the longest sequence, in tokens, of a model stage's ``source``; None if this machine does not know it."""
    origin = resolve(source, revision, base)
    if origin.origin is Origin.TINY:
        return MAX_POSITIONS
    config = None
    if origin.origin is Origin.FOLDER and origin.path is not None:
        config = origin.path / CONFIG
    elif origin.origin is Origin.HUB:
        with contextlib.suppress(UnknownArchitecture):
            config = _cached(origin.name, origin.revision)
    if config is None or not config.is_file():
        return None
    settings = read_optional(config)
    limit = settings.get("max_position_embeddings") or settings.get("n_positions")
    return limit if isinstance(limit, int) and limit > 0 else None


def _cached(name: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(path, str):
        raise UnknownArchitecture(
            f"the config.json of '{name}' is not on this machine; "
            f"`hf download {name} config.json --revision {revision}` fetches it alone"
        )
    return Path(path)
