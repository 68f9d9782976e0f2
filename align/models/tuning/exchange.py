"""Other values in trained parameters for a while: how a model whose start is part of its adapters looks back to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from align.errors import UserError
from align.models.precision import copies_left_alone


@contextmanager
def exchanged(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have ``parameters`` hold the ``values`` of the same names inside.

    Tensors are exchanged, not written to: a graph that was built before waits for its backward pass with them. Raises
    ``UserError`` for a parameter in parts: a pass gathers it from memory of its own, where the exchange is not seen.
    """
    if any(_is_in_parts(parameter) for parameter in parameters.values()):
        raise UserError(
            "the adapters were part of the model that came in, and a model in parts cannot go back to it: fsdp2 and "
            "stage 3 of deepspeed gather what the adapters are now. Take `strategy: ddp`."
        )
    held = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name].to(parameter.device, parameter.dtype)
    try:
        with copies_left_alone():
            yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = held[name]


def _is_in_parts(parameter: torch.Tensor) -> bool:
    """True for a parameter that FSDP2 or ZeRO-3 has shared out."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
