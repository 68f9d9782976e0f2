"""The line that a stage logs before its first step: trained parameters and estimated memory, counted on the model."""

from __future__ import annotations

from typing import Any

from align.config.base import Precision
from align.config.tuning import TuningBase
from align.models.activations import activations_per_token
from align.models.adapters import plain_of
from align.models.architecture import UnknownArchitecture, architecture_of

GRADIENT_AND_ADAMW = 12
"""Bytes per trained weight in float32 for its gradient and AdamW's two averages."""


def parameter_counts(model: Any) -> tuple[int, int]:
    """Return the trained and the total number of parameters; a matrix in 4 bits counts its unpacked weights."""
    trained = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else state.shape.numel()
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total


def weight_bytes(model: Any) -> int:
    """Return the bytes of all weights, trained or not, in the types they are kept in."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() * parameter.element_size()
        if state is not None:
            total += _scale_bytes(state)
    return total


def _scale_bytes(state: Any) -> int:
    nested = 0 if state.state2 is None else state.state2.absmax.numel() * state.state2.absmax.element_size()
    return int(state.absmax.numel() * state.absmax.element_size() + nested)


def notice(
    model: Any,
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
    rule; ``low_residual`` is how the model computes (``align.models.activations.activations_per_token``).
    """
    import torch

    trained, total = parameter_counts(model)
    loaded = model if loaded is None else loaded
    trained_at_once = parameter_counts(loaded)[0] if max_trained is None else max_trained
    # Weights as they are kept, and gradient and AdamW's averages for those that train together.
    needed = weight_bytes(loaded) + GRADIENT_AND_ADAMW * trained_at_once
    if precision == "bfloat16":  # autocast's bfloat16 copies of the matrices live until the backward pass
        plain = (module.weight for module in loaded.modules() if isinstance(module, torch.nn.Linear))
        needed += 2 * sum(weight.numel() for weight in plain if weight.is_floating_point())
    unit, label = (2**30, "GiB") if needed >= 2**29 else (2**20, "MiB")
    activations = _activations(model, tuning, precision, low_residual=low_residual)
    words = f"{trained:,} of {total:,} parameters are trained ({_percent(trained / total)})"
    if max_trained is not None:
        share = _percent(max_trained / total)
        words = f"at most {max_trained:,} of {total:,} parameters are trained in one step ({share})"
    return f"{tuning.label}: {words}; about {needed / unit:.2f} {label} for weights, gradients and AdamW, {activations}"


def _activations(model: Any, tuning: TuningBase, precision: Precision, low_residual: bool) -> str:
    plain = plain_of(model)
    try:
        sizes = architecture_of(plain.config.to_dict())
        per_token = activations_per_token(sizes, tuning, precision, low_residual=low_residual)
    except UnknownArchitecture:
        per_token = None
    if per_token is None:
        return "and activations beside them"
    return f"and {1000 * per_token / 2**20:,.0f} MiB per 1,000 tokens of a micro-batch for activations"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
