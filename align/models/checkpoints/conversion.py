"""Convert an external model, or a peft adapter and its base, into the folder that every later stage reads.

The folder has safetensors, a tokenizer and a chat template. Torch-free at import. Excluded: resolving the source
(``source.py``), the download, checking the files (``folder_checks.py``), and adapters that align trains (``tuning/``).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.errors import UserError
from align.models.chat.named_templates import require_tokens
from align.models.chat.render import require_chat_template
from align.models.chat.special_tokens import add_tokens, grow_embeddings, unify_special_tokens
from align.models.chat.template_settings import TemplateSettings
from align.models.checkpoints.files import ADAPTER_WEIGHTS, METADATA, read_header, read_object, read_optional
from align.models.checkpoints.folder_checks import EMBEDDINGS, FLOATS, require_embeddings, tensor_entries
from align.models.pretrained import adapter_config, attach_adapter, open_gguf, open_model, open_tokenizer, refusing
from align.store.json_files import write_text_atomically

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

LOG = logging.getLogger(__name__)


def stored_types(folder: Path) -> frozenset[str]:
    """Return the floating-point types of a model folder's tensors, as safetensors calls them: ``BF16``, ``F32``."""
    return frozenset(entry.dtype for entry in tensor_entries(folder).values()) & FLOATS


TYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"} | {
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    "uint8": "U8",
}
"""torch's names of types, and those in the header of a safetensors file."""


def write_tensors(tensors: Mapping[str, Any], file: str, metadata: Mapping[str, str], *, live: Collection[int]) -> None:
    """Write what ``safetensors.torch.save_file`` writes, with only one tensor at a time in memory.

    Tensors in a file leave memory once they are written, unless the address of their storage is in ``live``.
    """
    import torch

    from align.models.compute.processes import page_out

    # 1. Name, type, shape and place of each tensor; the widest types come first, so all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {METADATA: metadata}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        kind = TYPE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # 2. Their bytes.
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            opened.write(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy())
            if tensors[name].untyped_storage().data_ptr() not in live:
                page_out(tensors[name])


@dataclass(frozen=True)
class Changes:
    """Changes to a model on its way into the store."""

    chat_template: Callable[[str | None], str] | None = None
    """Function from the model's own template to the new one; None keeps its own."""
    template_name: str = ""
    """Name or path of the new template, for messages."""
    template_settings: TemplateSettings = field(default_factory=TemplateSettings)
    """Variables of the template, to store in it."""
    add_tokens: tuple[str, ...] = ()
    """Special tokens to add to the vocabulary."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights; ``auto`` is bfloat16 if all weights of the source are, else float32."""

    def type_for(self, source: Path | None = None) -> Any:
        """Return torch's type for the weights of the folder ``source``; None stands for a GGUF file."""
        import torch

        if self.dtype == "auto":
            return torch.bfloat16 if source is not None and stored_types(source) == {"BF16"} else torch.float32
        return getattr(torch, self.dtype)


def convert_gguf(
    gguf: Path, out_dir: Path, changes: Changes | None = None, warn: Callable[[str], None] = LOG.warning
) -> None:
    """Dequantize ``gguf`` and write it as a plain folder."""
    changes = changes or Changes()
    tokenizer, model = open_gguf(gguf, changes.type_for())
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
    changes = changes or Changes()
    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    if changes.chat_template is None:
        require_chat_template(tokenizer, f"the model '{folder}'")  # before gigabytes are read
    model, _ = open_model("causal", folder, changes.type_for(folder), trust_remote_code=trust_remote_code)
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

    The tokenizer is the adapter's, if it has one. Its template is the base's if it has none.
    """
    changes = changes or Changes()
    tokenizer = open_tokenizer(tokenizer_folder(adapter, base), trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        tokenizer.chat_template = open_tokenizer(base, trust_remote_code=trust_remote_code).chat_template
    if changes.chat_template is None:
        require_chat_template(tokenizer, f"the adapter '{adapter}' and its base")
    model = load_merged(base, adapter, len(tokenizer), trust_remote_code=trust_remote_code)
    _apply(changes, tokenizer, model, str(adapter))
    write_model(model.to(changes.type_for(base)), tokenizer, out_dir, warn, str(adapter))
    if trust_remote_code:
        remove_code(out_dir)


def _apply(changes: Changes, tokenizer: Any, model: PreTrainedModel, source: str) -> None:
    """Apply the template, its settings and the tokens of ``changes``, in place."""
    if changes.chat_template is not None:
        tokenizer.chat_template = changes.chat_template(tokenizer.chat_template)
    require_chat_template(tokenizer, f"the model '{source}'")
    changes.template_settings.apply(tokenizer)
    if changes.add_tokens:
        # A tokenizer with more tokens than the model embeds belongs to another model; resizing would hide that.
        require_embeddings(tokenizer, model, source, "it belongs to another model. Fetch the model's own.")
        add_tokens(tokenizer, model, changes.add_tokens)
    require_tokens(changes.template_name, tokenizer.get_vocab(), f"the vocabulary of '{source}'")


def write_model(
    model: PreTrainedModel, tokenizer: Any, out_dir: Path, warn: Callable[[str], None], source: str
) -> None:
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


def require_finite(model: nn.Module, place: Path | str) -> None:
    """Raise ``UserError`` when a weight is not finite: training would spread it."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{place}: the weight '{name}' holds NaN or infinity; its file is damaged. Fetch it again.")


CLASSIFIER = "SEQ_CLS"
"""peft's task of a reward model's adapter."""
OTHER_BASE = "Name its own base (`base_model` of a model stage, `--base` of `align export`)."


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on, as the adapter names it: a path or a Hub name, and its revision."""

    name: str
    revision: str | None = None


def read_base(config_file: Path) -> Base | None:
    """Return the base that an ``adapter_config.json`` names; None if it names none.

    Raises ``UserError`` for a reward model's adapter, which is no model to answer with.
    """
    settings = read_object(config_file)
    if settings.get("task_type") == CLASSIFIER:
        raise UserError(
            f"{config_file}: is the adapter of a reward model. Merge it by `align export {config_file.parent} --base "
            "BASE --output FOLDER`, and bring the folder in with `stage: artifact`."
        )
    name = settings.get("base_model_name_or_path")
    revision = settings.get("revision")
    if not isinstance(name, str) or not name:
        return None
    return Base(name, revision if isinstance(revision, str) and revision else None)


def tokenizer_folder(adapter: Path, base: Path) -> Path:
    """Return the folder of the tokenizer: the adapter's, if it has one."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def load_merged(base: Path, adapter: Path, tokens: int, *, trust_remote_code: bool = False) -> Any:
    """Return the model of ``base`` with the adapter merged, in float32 on the CPU.

    Embeddings grow first if the adapter was trained with more rows, or its tokenizer has more ``tokens``. Raises
    ``UserError`` if the adapter does not fit.
    """
    import torch

    model, _ = open_model("causal", base, torch.float32, trust_remote_code=trust_remote_code)
    # An adapter that stores a whole embedding decides the number of rows.
    grow_embeddings(model, _embedding_rows(adapter) or tokens)
    return attach(model, adapter, merge=True)


def _embedding_rows(adapter: Path) -> int | None:
    """Return the number of tokens that an adapter stores embeddings of; None if it stores no whole embedding."""
    entries = read_header(adapter / ADAPTER_WEIGHTS)
    return next((entry.shape[0] for name, entry in entries.items() if name.endswith(EMBEDDINGS)), None)


def attach(base: Any, adapter: Path, merge: bool) -> Any:
    """Put the adapter of a folder on ``base``, in place, and merge it if required."""
    kind = adapter_config(adapter).peft_type
    try:
        model, warned = attach_adapter(base, adapter)
    except (ValueError, RuntimeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[-1] if lines else type(error).__name__
        raise UserError(f"{adapter}: does not fit this base: {detail.rstrip('.')}. {OTHER_BASE}") from None
    # peft warns of missing keys and leaves these adapters at their initial values.
    missing = [text.splitlines()[0] for text in warned if "missing adapter keys" in text]
    if missing:
        raise UserError(f"{adapter}: {missing[0][:300]} The file is damaged, or belongs to another base. {OTHER_BASE}")
    if not hasattr(model, "merge_and_unload") or model.active_peft_config.is_prompt_learning:
        raise UserError(
            f"{adapter}: {str(kind).rpartition('.')[2]} cannot be merged into weights; use the adapter with its base."
        )
    if merge:
        _untie(model.get_base_model())
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise UserError(f"{adapter}: cannot be merged: {error}.") from None
    return model.eval()


def plain_of(model: nn.Module) -> Any:
    """Return the transformers model inside a peft model; another model as it is."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _untie(base: Any) -> None:
    """Give a head that is tied to its embedding its own matrix if an adapter is on either of them, in place.

    Before the merge such an adapter changes only its matrix; merged into the shared matrix it would change both.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    embedding: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    if not isinstance(embedding, BaseTunerLayer) and not isinstance(head, BaseTunerLayer):
        return
    if isinstance(embedding, BaseTunerLayer):
        embedding = embedding.get_base_layer()
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    if head is None or head.weight is not embedding.weight:
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}
