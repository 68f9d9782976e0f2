"""Temporarily put other values into trained parameters, to run a model as it started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from align.errors import UserError
from align.models.precision import without_autocast_cache


@contextmanager
def swapped_values(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, ``parameters`` hold the ``values`` of the same names and shapes.

    The tensors behind the parameters are exchanged, not overwritten: a graph that was built before still needs the old
    ones for its backward pass. Raises ``UserError`` for a partitioned parameter, which is gathered from memory of its
    own, where the exchange would have no effect.
    """
    if any(_is_partitioned(parameter) for parameter in parameters.values()):
        raise UserError(
            "the adapters were part of the initial model, and a partitioned model cannot return to it: fsdp2 and "
            "stage 3 of deepspeed always gather the current adapters. Take `strategy: ddp`."
        )
    original = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name].to(parameter.device, parameter.dtype)
    try:
        # Autocast may hold a bf16 copy of the values from before the exchange.
        with without_autocast_cache():
            yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = original[name]


def _is_partitioned(parameter: torch.Tensor) -> bool:
    """Return True for a parameter that FSDP2 or ZeRO-3 has sharded."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
