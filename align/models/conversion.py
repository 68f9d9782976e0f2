"""A model from outside, made into the form every later stage reads: a folder with safetensors, tokenizer, template.

Left out: deciding what to fetch (``source.py``) and the download itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import UserError
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    if chat_template is not None:
        tokenizer.chat_template = chat_template(tokenizer.chat_template)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=getattr(torch, dtype))
    # The weights are plain now; a config that still says "quantized" makes the next loader look for GGUF blocks.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, name, value)
    # The GGUF reader takes bos for eos; the template knows better, so there is nothing to tell the user.
    tokenizer.eos_token = None
    write_model(model, tokenizer, out_dir, warn)


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
    any template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    require_chat_template(tokenizer, f"the model '{folder}'")
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=getattr(torch, dtype), **options)
    write_model(model, tokenizer, out_dir, warn)


def write_model(model: Any, tokenizer: Any, out_dir: Path, warn: Callable[[str], None]) -> None:
    """Settle the special tokens and write model and tokenizer to ``out_dir``."""
    settle_special_tokens(tokenizer, model, warn)
    require_sane(model)
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of what was really sampled
    model.generation_config.do_sample = True  # a folder is sampled from by default, as its training was
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def require_sane(model: Any) -> None:
    """Raise ``UserError`` when a weight is not finite: nothing trained from it would be either."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"the model's weight '{name}' holds NaN or infinity; its file is damaged.")
