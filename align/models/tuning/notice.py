"""What a stage says before its first step: how much is trained, and what that takes. Counted on the model itself."""

from __future__ import annotations

from typing import Any

from align.config.tuning import TuningBase
from align.models.activations import activations_per_token
from align.models.architecture import UnknownArchitecture, architecture_of
from align.models.precision import Precision

GRADIENT_AND_ADAMW = 12
"""Bytes beside a trained weight in float32: its gradient, and AdamW's two averages."""


def parameter_counts(model: Any) -> tuple[int, int]:
    """Trained and all parameters; a matrix in 4 bits counts with the weights it stands for."""
    trained = everything = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else state.shape.numel()
        everything += size
        trained += size if parameter.requires_grad else 0
    return trained, everything


def weight_bytes(model: Any) -> int:
    """Bytes of all weights, trained or not, as they are kept."""
    found = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        found += parameter.numel() * parameter.element_size() + (0 if state is None else _scales(state))
    return found


def _scales(state: Any) -> int:
    nested = 0 if state.state2 is None else state.state2.absmax.numel() * state.state2.absmax.element_size()
    return int(state.absmax.numel() * state.absmax.element_size() + nested)


def notice(
    model: Any,
    tuning: TuningBase,
    precision: Precision,
    *,
    low_residual: bool = False,
    whole: Any = None,
    at_once: int | None = None,
) -> str:
    """One line: trained parameters, their share of all, and estimated memory.

    ``whole`` is what stands in memory where that is more than ``model``: its critic and reference; ``at_once`` how many
    parameters a schedule opens in one step at most, where not all that are trained are open together. Activations stand
    apart, per token, where there is a rule for them; ``low_residual`` is how the model computes
    (``align.models.activations.activations_per_token``).
    """
    import torch

    trained, everything = parameter_counts(model)
    whole = model if whole is None else whole
    opened = parameter_counts(whole)[0] if at_once is None else at_once
    needed = weight_bytes(whole) + GRADIENT_AND_ADAMW * opened
    if precision == "bfloat16":  # autocast's copies of the matrices, kept for the backward pass
        plain = (module.weight for module in whole.modules() if isinstance(module, torch.nn.Linear))
        needed += 2 * sum(weight.numel() for weight in plain if weight.is_floating_point())
    unit, label = (2**30, "GiB") if needed >= 2**29 else (2**20, "MiB")
    activations = _activations(model, tuning, precision, low_residual)
    words = f"{trained:,} of {everything:,} parameters are trained ({_percent(trained / everything)})"
    if at_once is not None:
        share = _percent(at_once / everything)
        words = f"at most {at_once:,} of {everything:,} parameters are trained in one step ({share})"
    return f"{tuning.label}: {words}; about {needed / unit:.2f} {label} for weights, gradients and AdamW, {activations}"


def _activations(model: Any, tuning: TuningBase, precision: Precision, low_residual: bool) -> str:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        found = activations_per_token(architecture_of(plain.config.to_dict()), tuning, precision, low_residual)
    except UnknownArchitecture:
        found = None
    if found is None:
        return "and activations beside them"
    return f"and {1000 * found / 2**20:,.0f} MiB per 1,000 tokens of a micro-batch for activations"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
