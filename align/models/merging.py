"""A trained model's weights under their plain transformers names, adapters folded in on the way out.

The live model is never touched: merging in place and back rounds the base a little every time (30 % of the weights
changed after 20 cycles in bf16). Each merged matrix exists only while it is handed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from align.models.tuning.folding import PEFT_PREFIX, folded, tuner_layers
from align.models.tuning.stored import weights_to_hand_over


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` for every weight and saved buffer of ``model``, as its plain counterpart names them.

    A tied head comes under both names. Tensors that no adapter changes are the model's own, not copies; the others are
    float32. Raises ``ValueError`` for an adapter that cannot be folded.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        yield from weights_to_hand_over(model).items()
        return
    layers = tuner_layers(model)
    done: set[str] = set()
    for full_name, tensor in model.state_dict().items():
        name = full_name.removeprefix(PEFT_PREFIX)
        if name == full_name or ".original_module." in name:
            continue  # what all layers of a method share is no weight of the model
        if ".modules_to_save." in name:  # what trains in full beside the adapters
            module, _, rest = name.partition(".modules_to_save.")
            yield f"{module}.{rest.partition('.')[2]}", tensor
            continue
        layer = _above(name, layers)
        if layer is None:
            yield name, tensor
        elif layer not in done:
            done.add(layer)
            yield from ((f"{layer}.{leaf}", value) for leaf, value in folded(layers[layer]).items())


def _above(name: str, layers: dict[str, Any]) -> str | None:
    """The adapted layer that a tensor belongs to."""
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            return name
    return None
