"""Convert an external model into the folder that every later stage reads: safetensors, tokenizer, chat template.

Left out: resolving the source (``source.py``) and the download.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.files import read_optional
from align.models.pretrained import open_gguf, open_model, open_tokenizer, refusing
from align.models.render import require_chat_template
from align.models.special_tokens import unify_special_tokens
from align.models.tokenizer_checks import require_embeddings
from align.store.atomic_write import write_text_atomically

LOG = logging.getLogger(__name__)


def convert_gguf(
    gguf: Path,
    out_dir: Path,
    chat_template: Callable[[str], str] | None = None,
    warn: Callable[[str], None] = LOG.warning,
    dtype: str = "float32",
) -> None:
    """Dequantize ``gguf`` and write it as a plain folder; ``chat_template`` rewrites its template."""
    import torch

    tokenizer, model = open_gguf(gguf, getattr(torch, dtype))
    if chat_template is not None:
        tokenizer.chat_template = chat_template(tokenizer.chat_template)
    # The weights are plain now. With a quantization config the next loader would expect GGUF blocks.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    # The GGUF reader uses bos as eos. The chat template has the right one, so the user needs no warning.
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
    """Load a model folder and write it as a plain one.

    ``chat_template``, the text of a template, replaces the model's own. Raises ``UserError`` for a model without any
    template, and for everything that ``pretrained.py`` refuses.
    """
    import torch

    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    require_chat_template(tokenizer, f"the model '{folder}'")
    model, _ = open_model("causal", Path(folder), getattr(torch, dtype), trust_remote_code=trust_remote_code)
    write_model(model, tokenizer, out_dir, warn, folder)
    if trust_remote_code:
        remove_code(out_dir)


def write_model(model: Any, tokenizer: Any, out_dir: Path, warn: Callable[[str], None], source: str) -> None:
    """Unify the special tokens and write model and tokenizer, which come from ``source``, to ``out_dir``."""
    unify_special_tokens(tokenizer, model, warn)
    require_finite(model, source)
    require_embeddings(tokenizer, model, source, "it belongs to another model. Fetch the model's own.")
    tokenizer.clean_up_tokenization_spaces = False  # it would remove spaces from sampled text
    model.generation_config.do_sample = True  # sample by default, as in training
    with refusing(Path(source, "generation_config.json")):  # save_pretrained would refuse it half-way
        model.generation_config.validate(strict=True)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def remove_code(out_dir: Path) -> None:
    """Remove the model's own code from a folder: later stages load it by transformers' classes only."""
    # save_pretrained copies the code and names it in auto_map.
    for file in out_dir.glob("*.py"):
        file.unlink()
    for name in ("config.json", "tokenizer_config.json"):
        settings = read_optional(out_dir / name)
        if settings.pop("auto_map", None) is not None:
            write_text_atomically(out_dir / name, json.dumps(settings, indent=2) + "\n")


def require_finite(model: Any, place: Path | str) -> None:
    """Raise ``UserError`` when a weight is not finite: nothing trained from it would be either."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{place}: the weight '{name}' holds NaN or infinity; its file is damaged. Fetch it again.")
