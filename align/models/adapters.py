"""peft adapters from outside: find the base of one, and merge it. Torch-free until one is merged.

Left out: adapters that align trains (``tuning/``), and checking the files (``folder_checks.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.files import ADAPTER_WEIGHTS, read_object

CLASSIFIER = "SEQ_CLS"
"""peft's task of a reward model's adapter."""
OTHER_BASE = "Name its own base (`base_model` of a model stage, `--base` of `align export`)."


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on, as the adapter names it: a path or a Hub name, and its revision."""

    name: str
    revision: str | None = None


def read_base(config_file: Path) -> Base | None:
    """Return the base that an ``adapter_config.json`` names; None where it names none.

    Raises ``UserError`` for a reward model's adapter, which is no model to answer with.
    """
    settings = read_object(config_file)
    if settings.get("task_type") == CLASSIFIER:
        raise UserError(
            f"{config_file}: is the adapter of a reward model. Merge it by `align export {config_file.parent} --base "
            "BASE --output FOLDER`, and bring the folder in with `stage: artifact`."
        )
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        return None
    return Base(name, revision if isinstance(revision, str) and revision else None)


def tokenizer_folder(adapter: Path, base: Path) -> Path:
    """Return the folder of the tokenizer: the adapter's, if it has one."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def load_merged(base: Path, adapter: Path, tokens: int, *, trust_remote_code: bool = False) -> Any:
    """Return the model of ``base`` with the adapter merged, in float32 on the CPU.

    Embeddings grow first where the adapter was trained with more rows, or its tokenizer has more ``tokens``. Raises
    ``UserError`` where the adapter does not fit.
    """
    import torch

    from align.models.added_tokens import grow_embeddings
    from align.models.pretrained import open_model

    model, _ = open_model("causal", base, torch.float32, trust_remote_code=trust_remote_code)
    # An adapter that stores a whole embedding decides the number of rows.
    grow_embeddings(model, _embedding_rows(adapter) or tokens)
    return attach(model, adapter, merge=True)


def _embedding_rows(adapter: Path) -> int | None:
    """Return the number of tokens that an adapter stores embeddings of; None where it stores no whole embedding."""
    from align.models.folder_checks import EMBEDDINGS
    from align.models.headers import read_header

    entries = read_header(adapter / ADAPTER_WEIGHTS)
    return next((entry.shape[0] for name, entry in entries.items() if name.endswith(EMBEDDINGS)), None)


def attach(base: Any, adapter: Path, merge: bool) -> Any:
    """Put the adapter of a folder on ``base``, in place, and merge it if required."""
    from align.models.pretrained import adapter_config, attach_adapter

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
            f"{adapter}: {str(kind).rpartition('.')[2]} cannot be merged into weights; use the adapter beside its base."
        )
    if merge:
        _untie(model.get_base_model())
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise UserError(f"{adapter}: cannot be merged: {error}.") from None
    return model.eval()


def plain_of(model: Any) -> Any:
    """Return the transformers model inside a peft model; another model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _untie(base: Any) -> None:
    """Give a head that is tied to its embedding a matrix of its own where an adapter is on one of the two, in place.

    Beside its base such an adapter changes that one alone; merged into the common matrix it would change both.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    has_adapter = [isinstance(module, BaseTunerLayer) for module in modules]
    embedding, head = (
        module.get_base_layer() if adapted else module for module, adapted in zip(modules, has_adapter, strict=True)
    )
    if not any(has_adapter) or head is None or head.weight is not embedding.weight:
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}
