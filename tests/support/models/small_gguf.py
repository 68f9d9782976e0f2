"""A small GGUF file, byte by byte."""

from __future__ import annotations

import struct


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def small_gguf(
    shape: tuple[int, ...] = (32, 4),
    kind: int = 8,
    offset: int = 0,
    size: int = 4 * 34,
    fields: dict[str, int] | None = None,
) -> bytes:
    """A GGUF file with a tensor in q8_0 (type 8: 32 numbers in 34 bytes), and whole numbers as fields."""
    sizes = {"llama.block_count": 1, "llama.embedding_length": 32} | (fields or {})
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 2 + len(sizes))
    header += gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama")
    header += gguf_text("tokens") + struct.pack("<IIQ", 9, 8, 2) + gguf_text("a") + gguf_text("b")
    for name, value in sizes.items():
        header += gguf_text(name) + struct.pack("<IQ", 10, value)
    header += gguf_text("token_embd.weight") + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    header += struct.pack("<IQ", kind, offset)
    return header + bytes(-len(header) % 32) + bytes(size)
