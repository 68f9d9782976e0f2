"""Load a model for a stage's ``tuning``, apply it, return to the initial policy, save the result.

This module dispatches; each family of methods has its own module.

The line that a stage logs before its first step: trained parameters and estimated memory, counted on the model.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from align.config.base import Precision
from align.config.tuning import (
    AdaptersTuning,
    FullTuning,
    Ia3Tuning,
    LoraTuning,
    PeftTuning,
    QloraTuning,
    TuningBase,
    VirtualTokens,
)
from align.errors import UserError
from align.models.checkpoints.conversion import plain_of, stored_types, write_tensors
from align.models.checkpoints.files import CONFIG
from align.models.compute.architecture import UnknownArchitecture
from align.models.compute.costs import activations_per_token
from align.models.compute.model_types import architecture_of
from align.models.compute.precision import cast_frozen_to_bf16, widen_vectors
from align.models.compute.processes import page_out, trim_malloc
from align.models.loading import load_policy, load_tokenizer, new_reward
from align.models.parameter_groups import freeze
from align.models.tuning import lora, stored, virtual_tokens
from align.models.tuning.lora import START, at_initial_values, note_ids, save_adapter
from align.models.tuning.peft_layers import merged_weights
from align.models.tuning.stored import is_stored
from align.patches.transformers import save_everything

UNEQUAL = ("recurrent_gemma",)
"""Types of model whose losses differ from transformers', and whose classes return no cache for a score head."""
CARRY_STATE = ("falcon_mamba", "mamba", "rwkv")
"""Types of model that are only layers with a state, whose code reads the weights of its matrices itself."""


def refuse_untrainable(source: Path, tuning: TuningBase, *, samples: bool = False) -> None:
    """Raise ``UserError`` for a type of model that cannot be trained by ``tuning``.

    ``samples`` is True for a stage that trains on what the model samples.
    """
    config = source / CONFIG
    kind = _model_type(source)
    if kind in UNEQUAL:
        raise UserError(
            f"{config}: models of type {kind} are not trained: their losses differ from transformers' by up to 4e-4, "
            "and reward models and RL fail. Name another model."
        )
    if kind in CARRY_STATE and samples:
        raise UserError(
            f"{config}: models of type {kind} have no cache of keys and values, so RL cannot sample from them. Name "
            "another model; sft, dpo and kto train this one."
        )
    if kind in CARRY_STATE and isinstance(tuning, QloraTuning):
        raise UserError(
            f"tuning: qlora cannot keep {kind} in 4 bits, because its layers read the weights of their matrices "
            "themselves. Use lora."
        )


def _model_type(source: Path) -> str | None:
    file = source / CONFIG
    return json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None


def load_for_tuning(source: Path, tuning: TuningBase, precision: Precision = "float32", *, reward: bool = False) -> Any:
    """Load the checkpoint in ``source`` for ``tuning``: a policy, or a reward model with a new score head.

    On the CPU: weights to train in float32, matrices that stay frozen in the base's type
    (``align.models.compute.precision``), or in 4 bits for ``qlora``.
    Raises ``UserError`` for a model that cannot be trained so.
    """
    refuse_untrainable(source, tuning)
    if "F16" in stored_types(source):
        raise UserError(
            f"{source}: has weights in float16, which training does not use: its largest number is 65,504, and "
            "activations exceed it. Bring the model in through a `model` stage, which converts it."
        )
    # Layers that read the weights themselves do not cast them.
    base_type = "float32" if _model_type(source) in CARRY_STATE else tuning.base_type(precision)
    if getattr(tuning, "base_dtype", "auto") not in ("auto", base_type):
        raise UserError(
            "tuning.base_dtype: bfloat16 needs products in bfloat16, and adapters that do not change the frozen "
            f"weights. This stage computes in {precision}. Set `precision: bfloat16`, or remove base_dtype."
        )
    dtype = torch.float32
    if not tuning.trains_all:
        dtype = frozen_dtype(source, base_type)
    model = new_reward(source, dtype) if reward else load_policy(source, dtype)
    if isinstance(tuning, QloraTuning):
        from align.models.tuning.quantized import quantize

        quantize(model, tuning)
    if isinstance(tuning, VirtualTokens) and not stored.is_stored(source):
        tokenizer = stored.tokenizer_for(load_tokenizer(source), source, tuning)
        virtual_tokens.add_embedding_rows(model, tokenizer.new_virtual_tokens)
    if base_type == "bfloat16":
        freeze_in_bf16(model, source)
    note_ids(model, source, tuning)
    return model


STORED_BASE = "align_stored_base"
"""Attribute of a model: the folder of its float32 weights, whose matrices it holds in bfloat16."""
SAVED_TYPE = "align_saved_type"
"""Attribute of a model: the type of its files, if that is not float32."""


def frozen_dtype(source: Path, base_type: Precision) -> torch.dtype:
    """Return the type to load a model to freeze in: the type of its files, or float32 if any tensor is wider."""
    return torch.bfloat16 if base_type == "bfloat16" and stored_types(source) == {"BF16"} else torch.float32


def freeze_in_bf16(model: nn.Module, source: Path) -> None:
    """Freeze ``model``, loaded from ``source``, and keep its matrices in bfloat16, in place.

    Norms, biases and a score head stay in float32. A matrix whose file is wider is read again to be folded into.
    """
    if model.dtype == torch.bfloat16:
        setattr(model, SAVED_TYPE, torch.bfloat16)
    else:
        setattr(model, STORED_BASE, source)
    model.requires_grad_(False)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    if model.dtype == torch.bfloat16:
        widen_vectors(model)
    else:
        cast_frozen_to_bf16(model, experts=True)


def stored_base(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Return the weights to fold adapters into by plain name; empty if they are the live weights of ``model``.

    They are read from the checkpoint's files when they are used.
    """
    inner = plain_of(model)
    source: Path | None = getattr(inner, STORED_BASE, None)
    if source is None:
        return {}
    loaded = new_reward(source) if hasattr(inner, "score") else load_policy(source)
    weights: dict[str, torch.Tensor] = loaded.state_dict()
    trained = {name for name, parameter in inner.named_parameters() if parameter.requires_grad}
    for name, live in inner.state_dict().items():
        if name in trained:
            weights.pop(name, None)
        elif name in weights and len(live) > len(weights[name]):
            # Virtual tokens have added rows, which are zero.
            weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, len(live) - len(weights[name])))
    return weights


def apply_tuning(
    model: PreTrainedModel,
    tuning: TuningBase,
    seed: int,
    *,
    tokenizer: Any = None,
    rows: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Prepare ``model`` for training by ``tuning`` and return it; random weights come from ``seed``.

    Methods that add tokens need ``tokenizer``; methods that initialize from data need ``rows``, the token ids of
    training rows. The caller's random state is unchanged.
    """
    stored.require_same(model, tuning)
    if isinstance(tuning, stored.Inserted):
        return stored.apply(model, tuning, seed, tokenizer)
    if isinstance(tuning, FullTuning):
        freeze(model, tuning.freeze)
        return model
    if isinstance(tuning, LoraTuning):
        return lora.wrap(model, tuning, seed, rows)
    if isinstance(tuning, QloraTuning):
        from align.models.tuning import quantized

        return quantized.wrap(model, tuning, seed, rows)
    if isinstance(tuning, (Ia3Tuning, PeftTuning)):
        return lora.wrap_method(model, tuning, seed)
    raise TypeError(f"nothing here applies {type(tuning).__name__}")


@contextlib.contextmanager
def initial_policy(model: Any) -> Iterator[Any]:
    """Inside, ``model`` is the policy before training, the reference of DPO and PPO.

    Adapters are disabled, or reset to their initial values if those were part of the model. A model that trains its own
    weights cannot go back; it stays as it is.
    """
    if hasattr(model, START):
        # Adapters that started from the weights took their part out of them, so switching them off is not enough.
        with at_initial_values(model):
            yield model
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield model
    else:
        yield model


def save_tuned(model: PreTrainedModel | PeftModel, tokenizer: Any, out_dir: Path) -> None:
    """Write ``model`` (a policy or a reward model) to ``out_dir`` as a plain folder, adapters folded in float32.

    The sums are rounded once, to the type of the files that a frozen base comes from. The live model does not change. A
    bare adapter goes to ``adapter/`` next to ``out_dir``, and into ``out_dir`` if it cannot be folded (``stored.py``).
    """
    # Merging needs float32 copies of matrices, one at a time, so return what training has freed.
    trim_malloc()
    inner: PreTrainedModel = plain_of(model)
    # The bare adapter is kept next to the merged model.
    if isinstance(model, PeftModel):
        save_adapter(model, out_dir.parent / "adapter")
    dtype: torch.dtype = getattr(inner, SAVED_TYPE, torch.float32)
    out_dir.mkdir(parents=True, exist_ok=True)
    weights = _folded(model, dtype, out_dir)
    live = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    write = partial(write_tensors, live=live)
    config = inner.config
    # Other tools read these tokens from the configs, not from the tokenizer.
    for settings in (config, getattr(inner, "generation_config", None)):
        if settings is not None:
            settings.eos_token_id = tokenizer.eos_token_id
            settings.pad_token_id = tokenizer.pad_token_id
    # Merging may widen or untie matrices, and the written config must say so.
    weights, changes = stored.prepare_save(inner, weights, tokenizer, out_dir)
    with stored.config_with(config, changes):
        save_everything(inner, write, save_directory=out_dir, state_dict=weights, is_main_process=True)
        # transformers writes the type of the live model, whose frozen matrices may be narrower than the files.
        config.dtype = dtype
        config.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def _on_disk(tensor: torch.Tensor, file: Path) -> torch.Tensor:
    """Return a copy of ``tensor`` in the deleted ``file``; the system can reclaim its pages at any time."""
    with file.open("w+b") as opened:
        opened.truncate(tensor.nbytes)
        pages = mmap.mmap(opened.fileno(), tensor.nbytes)
    file.unlink()
    copy = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
    page_out(copy)
    return copy


def _folded(model: PreTrainedModel | PeftModel, dtype: torch.dtype, scratch: Path) -> dict[str, torch.Tensor]:
    """Return all weights of ``model`` with its adapters folded, rounded once to ``dtype``; a score head is not rounded.

    A tensor that is not the model's own is in a deleted file in the folder ``scratch``: saving needs no second model in
    memory.
    """
    base = stored_base(model)
    own = {tensor.data_ptr() for tensor in (*model.state_dict().values(), *base.values())}
    weights = {}
    for name, tensor in merged_weights(model, base):
        weight = tensor.detach()
        if weight.is_floating_point() and not name.startswith("score."):
            weight = weight.to(dtype)
        if weight.data_ptr() not in own and weight.numel():
            weight = _on_disk(weight, scratch / "folded.bin")
            page_out(base.get(name, weight))
        weights[name] = weight
    return weights


def engine_source(source: Path, tuning: Any, scratch: Path) -> Path:
    """Return a model folder whose shapes have room for everything that ``tuning`` trains in the policy ``source``.

    That is ``source`` itself if its shapes fit, else a checkpoint of the untrained adapters, written to ``scratch``.
    """
    if not isinstance(tuning, AdaptersTuning) or is_stored(source):
        return source
    if not (scratch / "config.json").is_file():
        model = apply_tuning(load_for_tuning(source, tuning), tuning, seed=0)  # the seed has no effect: all start at 0
        save_tuned(model, load_tokenizer(source), scratch)
    return scratch


GRADIENT_AND_ADAMW = 12
"""Bytes per trained weight in float32 for its gradient and AdamW's two averages."""


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return the trained and the total number of parameters; a matrix in 4 bits counts its unpacked weights."""
    trained = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else state.shape.numel()
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights, trained or not, in the types they are kept in."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.nbytes
        if state is not None:
            total += state.absmax.nbytes
            total += 0 if state.state2 is None else state.state2.absmax.nbytes
    return total


def notice(
    model: PreTrainedModel,
    tuning: TuningBase,
    precision: Precision,
    *,
    low_residual: bool = False,
    loaded: Any = None,
    max_trained: int | None = None,
) -> str:
    """Return one line: trained parameters, their share of all, and estimated memory.

    ``loaded`` is everything in memory where that is more than ``model``: its critic and reference. ``max_trained`` is
    the most parameters that a layer schedule trains in one step. Activations are given per token, where there is a
    rule; ``low_residual`` is how the model computes (``align.models.compute.costs.activations_per_token``).
    """
    trained, total = parameter_counts(model)
    loaded = model if loaded is None else loaded
    trained_at_once = parameter_counts(loaded)[0] if max_trained is None else max_trained
    # Weights as they are kept, and gradient and AdamW's averages for those that train together.
    needed = weight_bytes(loaded) + GRADIENT_AND_ADAMW * trained_at_once
    if precision == "bfloat16":  # autocast's bfloat16 copies of the matrices live until the backward pass
        matrices = (module.weight for module in loaded.modules() if isinstance(module, torch.nn.Linear))
        needed += 2 * sum(weight.numel() for weight in matrices if weight.dtype == torch.float32)
    unit, label = (2**30, "GiB") if needed >= 2**29 else (2**20, "MiB")
    activations = _activations(model, tuning, precision, low_residual=low_residual)
    words = f"{trained:,} of {total:,} parameters are trained ({_percent(trained / total)})"
    if max_trained is not None:
        share = _percent(max_trained / total)
        words = f"at most {max_trained:,} of {total:,} parameters are trained in one step ({share})"
    return f"{tuning.label}: {words}; about {needed / unit:.2f} {label} for weights, gradients and AdamW, {activations}"


def _activations(model: PreTrainedModel, tuning: TuningBase, precision: Precision, low_residual: bool) -> str:
    inner = plain_of(model)
    try:
        sizes = architecture_of(inner.config.to_dict())
        per_token = activations_per_token(sizes, tuning, precision, low_residual=low_residual)
    except UnknownArchitecture:
        per_token = None
    if per_token is None:
        return "and activations beside them"
    return f"and {1000 * per_token / 2**20:,.0f} MiB per 1,000 tokens of a micro-batch for activations"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
