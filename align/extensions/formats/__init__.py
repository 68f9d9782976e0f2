"""Formats of exported models whose weights are rounded: GGUF with a file for Ollama, FP8, W8A8, GPTQ and AWQ."""

from align.registry import Extension, Format

EXTENSION = Extension(
    "export formats with rounded weights",
    (
        Format("gguf", "align.extensions.formats.writers:GGUF"),
        Format("fp8", "align.extensions.formats.writers:COMPRESSED"),
        Format("w8a8", "align.extensions.formats.writers:COMPRESSED"),
        Format("gptq", "align.extensions.formats.writers:CALIBRATED"),
        Format("awq", "align.extensions.formats.writers:CALIBRATED"),
    ),
)
