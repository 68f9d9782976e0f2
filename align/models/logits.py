"""Scale and soft cap that a model applies to the product of its vocabulary head before the softmax.

Code that runs trunk and head by themselves applies them, too, or it would compute another distribution than the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Fields of a config that logits are multiplied by (Cohere, Muse Glimmer, Falcon-H1)."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Fields with a soft cap (Gemma, RecurrentGemma)."""


@dataclass(frozen=True)
class LogitTransform:
    """Function from the head's product to the logits."""

    scale: float = 1.0
    cap: float | None = None
    """Bound of the scaled logits, by a tanh; None for a model without one."""

    def apply(self, product: torch.Tensor) -> torch.Tensor:
        """Return the logits, of the shape of ``product``."""
        logits = product if self.scale == 1.0 else self.scale * product
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


PLAIN = LogitTransform()
"""The head's product is the logits."""


def logit_transform(model: Any) -> LogitTransform:
    """Return the transform that the config of ``model`` asks for."""
    config = model.config.get_text_config()
    scale = _first_set(config, MULTIPLIERS)
    divisor = _first_set(config, ("logits_scaling",))
    if scale is None and divisor is not None:
        # Granite and MiniCPM3 divide by the field that HyperCLOVA X multiplies by.
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return LogitTransform(1.0 if scale is None else scale, _first_set(config, CAPS))


def _first_set(config: Any, names: tuple[str, ...]) -> float | None:
    """Return the first of the fields that the config has a value for."""
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)
