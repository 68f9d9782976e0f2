"""Estimate the memory of activations and the operations of passes through a decoder. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.config.tuning import LowRank, TuningBase
from align.models.compute.architecture import Architecture

if TYPE_CHECKING:
    from align.config.base import Precision

FLOAT = 4
SHORT = 512
"""Tokens of a row up to which a CPU uses plain matrix products for attention (``fast.ragged_rows.SHORT``)."""
SIZES: dict[Precision, int] = {"float32": 4, "bfloat16": 2}


def activations_per_token(
    model: Architecture,
    tuning: TuningBase,
    precision: Precision,
    *,
    low_residual: bool = True,
    checkpointing: bool = False,
    flash: bool = False,
) -> int | None:
    """Return the bytes that all layers keep per token; None for a layer or a tuning without a rule.

    Without ``low_residual`` (``align.models.compute.precision``) float32 flows between the layers, and autocast casts
    it for every matrix. With ``checkpointing`` only the inputs of layers are kept, and one layer at a time is
    computed again. ``flash``: ragged rows use torch's attention kernel, on a GPU or above ``SHORT`` tokens; it
    keeps keys and values once per query head.
    """
    layer = activations_of_layer(model, tuning, precision, low_residual, flash or not low_residual)
    if layer is None:
        return None
    last = _norm(model, tuning, precision, low_residual) * model.hidden
    layers = model.learning_layers(tuning)
    if not checkpointing:
        return layers * layer + last
    # Checkpointing keeps each layer's input, and the activations of the one layer that is computed again.
    flowing = SIZES[precision] if low_residual else FLOAT
    return layers * flowing * model.hidden + layer + last


def activations_of_layer(
    model: Architecture, tuning: TuningBase, precision: Precision, low_residual: bool, flash: bool
) -> int | None:
    """Return the bytes that one layer keeps per token."""
    plain = tuning.trains_all or (isinstance(tuning, LowRank) and not tuning.dora)
    if model.norms is None or not plain:
        return None
    size = SIZES[precision]
    out = next(linear for linear in model.linears if "o_proj" in linear.path)
    down = next(linear for linear in model.linears if "down_proj" in linear.path)
    norms = _norm(model, tuning, precision, low_residual) * (model.norms * model.hidden + model.normed_heads)
    # Matrices that read the hidden states: queries, keys, values, gate and up.
    readers = sum(linear.inputs == model.hidden and linear not in (out, down) for linear in model.linears)
    # Then autocast casts the float32 input once for each of these matrices.
    rounded_apart = precision == "bfloat16" and not low_residual
    inputs = size * (readers if rounded_apart else 2) * model.hidden  # of attention and of the MLP
    keys = out.inputs if flash else model.key_value_width
    attention = size * 2 * (out.inputs + keys)  # queries and what comes out, keys and values
    gated = size * 4 * down.inputs  # gate, its activation, up, their product
    low_rank = size * tuning.rank * len(model.linears) if isinstance(tuning, LowRank) else 0
    return norms + inputs + attention + gated + low_rank


def passing_per_token(model: Architecture, size: int, flowing: int) -> int:
    """Return the bytes per token in a pass without gradients, at the widest part of a layer.

    ``size`` is the bytes of a product's value, ``flowing`` the bytes of a value between layers, which exists twice: as
    it comes in, and normed. In addition there are the gate, its factor and their product, or attention's inputs.
    """
    queries = next((linear.inputs for linear in model.linears if "o_proj" in linear.path), model.hidden)
    inner = max((linear.inputs for linear in model.linears), default=model.hidden)
    attention = 4 * queries + 2 * model.key_value_width  # queries, result, keys and values as read and repeated
    return flowing * 2 * model.hidden + size * max(3 * inner, attention)


def _norm(model: Architecture, tuning: TuningBase, precision: Precision, low_residual: bool) -> int:
    """Return the bytes per feature that a norm keeps: its input; a norm that is not lean also its normed input."""
    lean = model.lean_norms and low_residual
    if lean and precision == "bfloat16":
        return SIZES[precision]
    return (1 + tuning.trains_all) * FLOAT
