"""Convert an external model into the folder that every later stage reads: safetensors, tokenizer, chat template.

Left out: resolving the source (``source.py``) and the download.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.adapters import load_merged, tokenizer_folder
from align.models.added_tokens import add_tokens
from align.models.files import read_optional
from align.models.named_templates import require_tokens
from align.models.pretrained import open_gguf, open_model, open_tokenizer, refusing
from align.models.render import require_chat_template
from align.models.special_tokens import unify_special_tokens
from align.models.tokenizer_checks import require_embeddings
from align.store.atomic_write import write_text_atomically

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Changes:
    """Changes to a model on its way into the store."""

    chat_template: Callable[[str | None], str] | None = None
    """Function from the model's own template to the new one; None keeps its own."""
    template_name: str = ""
    """Name or path of the new template, for messages."""
    add_tokens: tuple[str, ...] = ()
    """Special tokens to add to the vocabulary (``added_tokens.py``)."""
    dtype: str = "float32"


def convert_gguf(
    gguf: Path, out_dir: Path, changes: Changes | None = None, warn: Callable[[str], None] = LOG.warning
) -> None:
    """Dequantize ``gguf`` and write it as a plain folder."""
    import torch

    changes = changes or Changes()
    tokenizer, model = open_gguf(gguf, getattr(torch, changes.dtype))
    # The weights are plain now. With a quantization config the next loader would expect GGUF blocks.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    # The GGUF reader uses bos as eos. The chat template has the right one, so the user needs no warning.
    tokenizer.eos_token = None
    _apply(changes, tokenizer, model, str(gguf))
    write_model(model, tokenizer, out_dir, warn, str(gguf))


def copy_model(
    folder: Path,
    out_dir: Path,
    changes: Changes | None = None,
    warn: Callable[[str], None] = LOG.warning,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Load a model folder and write it as a plain one.

    Raises ``UserError`` for a model without any template, and for everything that ``pretrained.py`` refuses.
    """
    import torch

    changes = changes or Changes()
    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    if changes.chat_template is None:
        require_chat_template(tokenizer, f"the model '{folder}'")  # before gigabytes are read
    dtype = getattr(torch, changes.dtype)
    model, _ = open_model("causal", folder, dtype, trust_remote_code=trust_remote_code)
    _apply(changes, tokenizer, model, str(folder))
    write_model(model, tokenizer, out_dir, warn, str(folder))
    if trust_remote_code:
        remove_code(out_dir)


def merge_adapter(
    base: Path,
    adapter: Path,
    out_dir: Path,
    changes: Changes | None = None,
    warn: Callable[[str], None] = LOG.warning,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Merge a peft adapter into its base in float32 and write the result as a plain folder.

    The tokenizer is the adapter's, if it has one. Its template is the base's where it has none.
    """
    import torch

    changes = changes or Changes()
    tokenizer = open_tokenizer(tokenizer_folder(adapter, base), trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        tokenizer.chat_template = open_tokenizer(base, trust_remote_code=trust_remote_code).chat_template
    if changes.chat_template is None:
        require_chat_template(tokenizer, f"the adapter '{adapter}' and its base")
    model = load_merged(base, adapter, len(tokenizer), trust_remote_code=trust_remote_code)
    _apply(changes, tokenizer, model, str(adapter))
    write_model(model.to(getattr(torch, changes.dtype)), tokenizer, out_dir, warn, str(adapter))
    if trust_remote_code:
        remove_code(out_dir)


def _apply(changes: Changes, tokenizer: Any, model: Any, source: str) -> None:
    """Apply the template and the tokens of ``changes``, both in place."""
    if changes.chat_template is not None:
        tokenizer.chat_template = changes.chat_template(tokenizer.chat_template)
    require_chat_template(tokenizer, f"the model '{source}'")
    if changes.add_tokens:
        # A tokenizer with more tokens than the model embeds belongs to another model; resizing would hide that.
        require_embeddings(tokenizer, model, source, "it belongs to another model. Fetch the model's own.")
        add_tokens(tokenizer, model, changes.add_tokens)
    require_tokens(changes.template_name, tokenizer.get_vocab(), f"the vocabulary of '{source}'")


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
