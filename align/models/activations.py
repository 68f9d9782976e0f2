"""What a forward pass leaves for the backward pass, in bytes, counted from the sizes of a decoder alone. Torch-free.

Counted from what autograd keeps of norms, linear layers, attention by a fused kernel and a gated MLP. Left out: padding
inside attention, and one copy of its result where a flash kernel runs on ragged rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.config.tuning import LowRank, TuningBase
from align.models.architecture import Architecture

if TYPE_CHECKING:
    from align.models.precision import Precision

FLOAT = 4
SHORT = 512
"""Tokens of a row up to which a CPU takes attention's products as they are written
(``align.models.fast.ragged_rows.SHORT``)."""
SIZES: dict[Precision, int] = {"float32": 4, "bfloat16": 2}


def activations_per_token(
    model: Architecture,
    tuning: TuningBase,
    precision: Precision,
    low_residual: bool = True,
    checkpointing: bool = False,
    flash: bool = False,
) -> int | None:
    """Bytes that one token leaves in all layers for the backward pass; None for a layer or a tuning without a rule.

    Without ``low_residual`` (``align.models.precision``), as trl trains, float32 flows between the layers, and autocast
    rounds it anew for every matrix. With ``checkpointing`` only what goes into a layer is kept, and one layer at a time
    is computed again. ``flash``: ragged rows' attention is torch's own kernel, on a GPU or beyond ``SHORT``
    tokens, as trl's always is; it keeps keys and values once for every head.
    """
    layer = activations_of_layer(model, tuning, precision, low_residual, flash or not low_residual)
    if layer is None:
        return None
    last = _norm(model, tuning, precision, low_residual) * model.hidden
    layers = model.learning_layers(tuning)
    if not checkpointing:
        return layers * layer + last
    flowing = SIZES[precision] if low_residual else FLOAT
    return layers * flowing * model.hidden + layer + last


def activations_of_layer(
    model: Architecture, tuning: TuningBase, precision: Precision, low_residual: bool, flash: bool
) -> int | None:
    """Bytes that one token leaves in one layer."""
    plain = tuning.trains_all or (isinstance(tuning, LowRank) and not tuning.dora)
    if model.norms is None or not plain:
        return None
    size = SIZES[precision]
    out = next(linear for linear in model.linears if "o_proj" in linear.path)
    down = next(linear for linear in model.linears if "down_proj" in linear.path)
    norms = _norm(model, tuning, precision, low_residual) * (model.norms * model.hidden + model.normed_heads)
    readers = sum(linear.inputs == model.hidden and linear not in (out, down) for linear in model.linears)
    rounded_apart = precision == "bfloat16" and not low_residual
    inputs = size * (readers if rounded_apart else 2) * model.hidden  # of attention and of the MLP
    keys = out.inputs if flash else model.key_value_width
    attention = size * 2 * (out.inputs + keys)  # queries and what comes out, keys and values
    gated = size * 4 * down.inputs  # gate, its activation, up, their product
    low_rank = size * tuning.rank * len(model.linears) if isinstance(tuning, LowRank) else 0
    return norms + inputs + attention + gated + low_rank


def passing_per_token(model: Architecture, size: int, flowing: int) -> int:
    """Bytes of one token in a pass without gradients, while the widest part of a layer is computed.

    ``size`` is that of a product's result, ``flowing`` that of what goes from layer to layer, which is there twice: as
    it came in, and normed. Beside it stands the gate, what it is multiplied with and the result, or attention's input.
    """
    queries = next((linear.inputs for linear in model.linears if "o_proj" in linear.path), model.hidden)
    inner = max((linear.inputs for linear in model.linears), default=model.hidden)
    attention = 4 * queries + 2 * model.key_value_width  # queries, result, keys and values as read and repeated
    return flowing * 2 * model.hidden + size * max(3 * inner, attention)


def _norm(model: Architecture, tuning: TuningBase, precision: Precision, low_residual: bool) -> int:
    """Bytes a feature that a norm keeps: a lean one its input, any other, in float32, what its weight meets too."""
    lean = model.lean_norms and low_residual
    return SIZES[precision] if lean and precision == "bfloat16" else (1 + tuning.trains_all) * FLOAT
