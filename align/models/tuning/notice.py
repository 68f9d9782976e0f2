"""What a stage says before its first step: how much is trained, and what that takes. Counted on the model itself."""

from __future__ import annotations

from typing import Any

from align.models.precision import Precision
from align.tuning import TuningBase

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


def notice(model: Any, tuning: TuningBase, precision: Precision) -> str:
    """One line: trained parameters, their share of all, and estimated memory without activations."""
    import torch

    trained, everything = parameter_counts(model)
    needed = weight_bytes(model) + GRADIENT_AND_ADAMW * trained
    if precision == "bfloat16":  # autocast's copies of the matrices, kept for the backward pass
        plain = (module.weight for module in model.modules() if isinstance(module, torch.nn.Linear))
        needed += 2 * sum(weight.numel() for weight in plain if weight.is_floating_point())
    unit, label = (2**30, "GiB") if needed >= 2**29 else (2**20, "MiB")
    return (
        f"{tuning.label}: {trained:,} of {everything:,} parameters are trained ({_percent(trained / everything)}); "
        f"about {needed / unit:.2f} {label} for weights, gradients and AdamW, and activations beside them"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
