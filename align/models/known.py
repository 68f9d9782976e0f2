"""Look up the sizes of a base model from what is on this machine. Fetches nothing and never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.models.architecture import Architecture, UnknownArchitecture, architecture_of, read_architecture
from align.models.source import Origin, resolve

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


def _cached(name: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(path, str):
        raise UnknownArchitecture(
            f"the config.json of '{name}' is not on this machine; "
            f"`hf download {name} config.json --revision {revision}` fetches it alone"
        )
    return Path(path)
