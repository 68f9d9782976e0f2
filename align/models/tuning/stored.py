"""Apply the inserted methods (virtual tokens, prefix, bottleneck, LLaMA-Adapter), save them and load them again.

Adapters that plain weights can hold are merged into them (``virtual_tokens``, a parallel ``bottleneck``). The others
are stored next to the frozen model: ``model/adapter/`` holds ``adapter.json``, the description, and
``adapter.safetensors``. Without that folder ``model/`` is the untrained model; the loaders here always read both.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from align.config.tuning import AdaptersTuning, FullTuning, PrefixTuning, PromptTuning, PTuning, Tuning
from align.errors import UserError
from align.models.tuning import inserted_methods, virtual_tokens
from align.models.tuning.inserted import inserted_weights, insertions, train_insertions_only
from align.store.json_files import write_text_atomically

FOLDER = "adapter"
DESCRIPTION = "adapter.json"
WEIGHTS = "adapter.safetensors"
FORMAT = 1

Inserted = PrefixTuning | PromptTuning | PTuning | AdaptersTuning


def is_stored(model_dir: Path) -> bool:
    """Return True for a checkpoint with an inserted adapter next to its weights."""
    return (model_dir / FOLDER / DESCRIPTION).is_file()


def stored_tuning(model_dir: Path) -> Inserted:
    """Return the tuning of a checkpoint's stored adapter. Raises ``UserError`` for a description that is damaged."""
    from pydantic import TypeAdapter, ValidationError

    file = model_dir / FOLDER / DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise ValueError(f"its format is {description['format']}, this version reads {FORMAT}")
        tuning: Any = TypeAdapter(Tuning).validate_python(description["tuning"])
        assert isinstance(tuning, Inserted)
        assert not isinstance(tuning, PrefixTuning) or int(description["first_token"]) >= 0
        return tuning
    except (OSError, ValueError, KeyError, TypeError, AssertionError, ValidationError) as error:
        raise UserError(f"{file} does not describe an adapter: {error}. The checkpoint is damaged.") from None


def tokenizer_for(tokenizer: Any, model_dir: Path, tuning: Any) -> Any:
    """Return the checkpoint's ``tokenizer`` with the virtual tokens that ``tuning`` trains, if any."""
    if not isinstance(tuning, PrefixTuning | PromptTuning | PTuning):
        return tokenizer
    if is_stored(model_dir):  # training continues with the existing tokens
        stored = stored_tuning(model_dir)
        # A prefix keeps its tokens in the stored adapter's description; other methods have merged theirs.
        if isinstance(stored, PrefixTuning):
            tokenizer.new_virtual_tokens = [_first_token(model_dir) + index for index in range(stored.tokens)]
        return tokenizer
    return virtual_tokens.extend_tokenizer(tokenizer, tuning)


def apply(model: Any, tuning: Inserted, seed: int, tokenizer: Any) -> Any:
    """Insert what ``tuning`` trains into ``model`` and freeze the rest.

    Insertions of the checkpoint are trained further by the same tuning, and refused for any other.
    """
    if getattr(model, "inserted_tuning", None) is not None:
        require_same(model, tuning)
        return train_insertions_only(model, started=True)
    if isinstance(tuning, PrefixTuning):
        model = inserted_methods.wrap(model, tuning, seed, tokenizer)
    elif isinstance(tuning, AdaptersTuning):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inserted_methods.insert_adapters(model, tuning)
        model = train_insertions_only(model)
    else:
        model = virtual_tokens.wrap(model, tuning, seed, tokenizer)
    model.inserted_tuning = tuning
    return model


def require_same(model: nn.Module, tuning: Any) -> None:
    """Raise ``UserError`` for a model with a stored adapter and a ``tuning`` that is neither its own nor full."""
    carried = getattr(model, "inserted_tuning", None)
    if carried is None or isinstance(tuning, FullTuning):
        return
    # The initial text matters only when the tokens are created.
    ignored = {"text", "base_dtype"}
    same_fields = carried.model_dump(exclude=ignored) == tuning.model_dump(exclude=ignored)
    if type(carried) is not type(tuning) or not same_fields:
        raise UserError(
            f"tuning.method: the checkpoint carries an adapter of tuning {carried.label}, which is trained further "
            f"by the same tuning or with method full, not by {tuning.label}. Use one of these, or start from the "
            "checkpoint before it."
        )


def insert_empty(model: Any, tuning: Inserted, first_token: int | None) -> None:
    """Insert modules of ``tuning`` into ``model``, whose weights are read afterwards."""
    with torch.random.fork_rng(devices=[]):
        if isinstance(tuning, PrefixTuning):
            assert first_token is not None
            # These values are only placeholders of the right shape.
            rows = [
                {name: torch.zeros(tuning.tokens, width) for name, width in layer.items()}
                for layer in inserted_methods.widths(model)
            ]
            inserted_methods.insert_prefix(model, first_token, rows)
        else:
            assert isinstance(tuning, AdaptersTuning)
            inserted_methods.insert_adapters(model, tuning)
    model.inserted_tuning = tuning


def load_adapter(model: PreTrainedModel, model_dir: Path) -> Any:
    """Return ``model``, loaded from ``model_dir``, with the adapter that is stored there, if any.

    Raises ``UserError`` for an adapter that is damaged or of another model.
    """
    if not is_stored(model_dir):
        return model
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tuning = stored_tuning(model_dir)
    file = model_dir / FOLDER / WEIGHTS
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}. The checkpoint is damaged.") from None
    insert_empty(model, tuning, _first_token(model_dir) if isinstance(tuning, PrefixTuning) else None)
    inserted = inserted_weights(model)
    # Names first, then shapes.
    mismatched = sorted(inserted.keys() ^ stored.keys()) or [
        name for name in inserted if inserted[name].shape != stored[name].shape
    ]
    if mismatched:
        raise UserError(f"{file} does not fit the model beside it: {mismatched[0]} differs ({len(mismatched)} in all).")
    with torch.no_grad():
        for name, tensor in inserted.items():
            tensor.copy_(stored[name])
    return model


def _first_token(model_dir: Path) -> int:
    return int(json.loads((model_dir / FOLDER / DESCRIPTION).read_text(encoding="utf-8"))["first_token"])


def write_adapter(model: Any, folder: Path) -> None:
    """Write the insertions of ``model`` and their description to ``folder``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokens = getattr(model.get_input_embeddings(), virtual_tokens.NAME, None)
    described = {
        "format": FORMAT,
        "tuning": model.inserted_tuning.model_dump(mode="json", exclude_defaults=True, exclude={"base_dtype"})
        | {"method": model.inserted_tuning.method},
        "first_token": None if tokens is None else tokens.first,
    }
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in inserted_weights(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_text_atomically(folder / DESCRIPTION, json.dumps(described, indent=1))


def plain_weights(model: PreTrainedModel, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return every weight of ``model``, of any shape, by its name in a saved folder and in an engine.

    Tensors of ``base`` replace the frozen ones of their names. Insertions are merged where plain weights can hold
    them, and listed by name elsewhere. An engine that loads these weights was opened on ``engine_source``.
    """
    weights = {name: base.get(name, tensor.detach()) for name, tensor in model.state_dict().items()}
    if virtual_tokens.learned_tokens(model) is not None:
        return virtual_tokens.merge_into_embedding(model, weights)
    return inserted_methods.merge_into_mlps(model, weights) if inserted_methods.is_parallel(model) else weights


def prepare_save(
    model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, out_dir: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the ``weights`` (``plain_weights``) of a plain folder, and the config fields that change with them.

    Tensors are of any shape. The bare adapter is written to ``adapter/``: next to ``out_dir`` when it is merged, in
    ``out_dir`` when it is not.
    """
    if not insertions(model):
        return weights, {}
    # 1. Virtual tokens are merged into the embedding, which unties the head.
    tokens = virtual_tokens.learned_tokens(model)
    if tokens is not None:
        ids = [tokens.first + index for index in range(tokens.count)]
        where = f"tuning.method: {model.inserted_tuning.method}, after training"
        virtual_tokens.require_small_mass(model, tokenizer, ids, where)
        virtual_tokens.write_peft(tokens, out_dir.parent / FOLDER, reward=hasattr(model, "score"))
        has_head = model.get_output_embeddings() is not None
        return weights, {"tie_word_embeddings": False} if has_head else {}
    # 2. A parallel bottleneck is merged into the MLPs, which are wider then.
    if inserted_methods.is_parallel(model):
        write_adapter(model, out_dir.parent / FOLDER)
        return weights, {"intermediate_size": inserted_methods.merged_width(model)}
    # 3. Everything else is stored next to the frozen weights.
    write_adapter(model, out_dir / FOLDER)
    inserted = inserted_weights(model)
    return {name: tensor for name, tensor in weights.items() if name not in inserted}, {}


@contextlib.contextmanager
def config_with(config: Any, changes: dict[str, Any]) -> Iterator[None]:
    """Inside, ``config`` (or its text part) has other values."""
    part = config.get_text_config()
    before = {name: getattr(part, name) for name in changes}
    for name, value in changes.items():
        setattr(part, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(part, name, value)
