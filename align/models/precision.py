"""The type of the matrix products, and nothing else: weights and AdamW's state stay float32 whatever it says.

bfloat16 keeps 8 bits of a number: at a learning rate of 1e-6 an update is below the rounding of a weight near 0.02 and
is lost. So weights are float32 masters, and ``torch.autocast`` rounds only the operands of matrix products.
"""

from __future__ import annotations

from typing import Any, Literal

Precision = Literal["bfloat16", "float32"]


def compute_dtype(precision: Precision) -> Any:
    """The ``torch.dtype`` of a precision."""
    import torch

    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def autocast(device: Any, precision: Precision) -> Any:
    """Context in which a forward pass computes in ``precision``; it changes nothing for float32."""
    import torch

    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bfloat16")
