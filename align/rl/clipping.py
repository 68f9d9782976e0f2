"""Gradient clipping: policy and critic separately, so a critic that is far off does not shrink the policy's step."""

from __future__ import annotations

from typing import Any

import torch

from align.models.checkpoints.sharding import full_tensor
from align.rl.model import PolicyAndReference
from align.rl.refusals import require_finite
from align.training.zero import clip_grad_norm

PARTS = ("policy", "critic")


def clip_gradients(trainer: Any) -> torch.Tensor:
    """Clip each part's gradients and add their norms to the metrics; return the norm over all parts, a scalar."""
    # DeepSpeed has called ``clip_parts`` already, and made the step.
    norms = trainer.gradient_norms if trainer.is_deepspeed_enabled else clip_by_part(trainer.model, _limit(trainer))
    norms = {name: full_tensor(norm) for name, norm in norms.items()}
    for name, norm in norms.items():
        require_finite(trainer, f"gradient of the {name}", norm)
        trainer.objective.averages.add(f"grad_norm_{name}", norm)
    total: torch.Tensor = torch.stack(list(norms.values())).norm()
    return total


def clip_by_part(model: PolicyAndReference, max_norm: float) -> dict[str, torch.Tensor]:
    """Scale each part's gradients down to ``max_norm``; return the norms before, scalars, 0 without gradients."""
    norms = {}
    for part in PARTS:
        if not hasattr(model, part):
            continue
        parameters = [parameter for parameter in getattr(model, part).parameters() if parameter.grad is not None]
        norms[part] = torch.nn.utils.clip_grad_norm_(parameters, max_norm) if parameters else torch.zeros(())
    return norms


def clip_parts(trainer: Any) -> None:
    """Clip like ``clip_by_part`` when DeepSpeed holds the gradients; it calls this before each step."""
    trainer.gradient_norms = {}
    for part in PARTS:
        model = getattr(trainer.model, part, None)
        if model is not None:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            trainer.gradient_norms[part] = clip_grad_norm(trained, _limit(trainer))


def _limit(trainer: Any) -> float:
    return float(trainer.args.max_grad_norm)
