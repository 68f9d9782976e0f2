"""A model from outside, made into the form every later stage reads: a folder with safetensors, tokenizer, template.

Left out: deciding what to fetch (``source.py``) and the download itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.files import read_optional
from align.models.pretrained import open_gguf, open_model, open_tokenizer, refusing
from align.models.render import require_chat_template
from align.models.special_tokens import settle_special_tokens


def convert_gguf(
    gguf: Path,
    out_dir: Path,
    chat_template: Callable[[str], str] | None = None,
    warn: Callable[[str], None] = print,
    dtype: str = "float32",
) -> None:
    """Dequantize ``gguf`` and write it as an ordinary folder. ``chat_template`` rewrites the template found in it."""
    import torch

    tokenizer, model = open_gguf(gguf, getattr(torch, dtype))
    if chat_template is not None:
        tokenizer.chat_template = chat_template(tokenizer.chat_template)
    # The weights are plain now; a config that still says "quantized" makes the next loader look for GGUF blocks.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, name, value)
    # The GGUF reader takes bos for eos; the template knows better, so there is nothing to tell the user.
    tokenizer.eos_token = None
    write_model(model, tokenizer, out_dir, warn, str(gguf))


def copy_model(
    folder: str,
    out_dir: Path,
    *,
    trust_remote_code: bool,
    chat_template: str | None,
    dtype: str,
    warn: Callable[[str], None],
) -> None:
    """Load a model folder and write it as an ordinary one.

    ``chat_template`` is the template's text and replaces the model's own. Raises ``UserError`` for a model without
    any template, and for whatever ``pretrained.py`` refuses.
    """
    import torch

    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    require_chat_template(tokenizer, f"the model '{folder}'")
    model, _ = open_model("causal", Path(folder), getattr(torch, dtype), trust_remote_code=trust_remote_code)
    write_model(model, tokenizer, out_dir, warn, folder)
    if trust_remote_code:
        drop_code(out_dir)


def write_model(model: Any, tokenizer: Any, out_dir: Path, warn: Callable[[str], None], source: str) -> None:
    """Settle the special tokens and write model and tokenizer, which came from ``source``, to ``out_dir``."""
    settle_special_tokens(tokenizer, model, warn)
    require_sane(model, source)
    _require_rows(model, tokenizer, source)
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of what was really sampled
    model.generation_config.do_sample = True  # a folder is sampled from by default, as its training was
    with refusing(Path(source, "generation_config.json")):  # saving would refuse it, with part of the folder written
        model.generation_config.validate(strict=True)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def drop_code(out_dir: Path) -> None:
    """Take the code that came with a model out of a folder: later stages run none, and load it by transformers' own."""
    for file in out_dir.glob("*.py"):
        file.unlink()
    for name in ("config.json", "tokenizer_config.json"):
        settings = read_optional(out_dir / name)
        if settings.pop("auto_map", None) is not None:
            (out_dir / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _require_rows(model: Any, tokenizer: Any, source: str) -> None:
    """Raise ``UserError`` for a tokenizer with more tokens than embeddings: its settings may add some."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens and the model embeds {rows}: it is the tokenizer of "
            "another model. Fetch the model's own."
        )


def require_sane(model: Any, place: Path | str) -> None:
    """Raise ``UserError`` when a weight is not finite: nothing trained from it would be either."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{place}: the weight '{name}' holds NaN or infinity; its file is damaged. Fetch it again.")
