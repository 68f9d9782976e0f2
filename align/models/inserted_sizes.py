"""How many parameters the methods of our own put into a decoder, from its architecture alone. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.config.tuning import AdaptersTuning, PrefixTuning, PTuning, TuningBase, VirtualTokens

if TYPE_CHECKING:
    from align.models.architecture import Architecture


def inserted_parameters(model: Architecture, tuning: TuningBase) -> int | None:
    """What ``tuning`` trains beside the frozen model; None for a method that is not one of ours."""
    if isinstance(tuning, PTuning):
        return tuning.tokens * model.hidden + _encoder(model.hidden, tuning.hidden_size or model.hidden, tuning.encoder)
    if isinstance(tuning, PrefixTuning):
        return tuning.tokens * model.layers * 2 * model.key_value_width
    if isinstance(tuning, VirtualTokens):
        return tuning.tokens * model.hidden
    if not isinstance(tuning, AdaptersTuning):
        return None
    if tuning.kind == "llama_adapter":
        layers = tuning.layers if tuning.layers is not None else max(1, model.layers - 2)
        return layers * (tuning.tokens * model.hidden + 1)
    if tuning.position == "parallel":
        return model.layers * 3 * tuning.size * model.hidden
    return model.layers * len(tuning.after) * (2 * tuning.size * model.hidden + tuning.size + model.hidden)


def _encoder(hidden: int, inner: int, kind: str) -> int:
    """The network of p-tuning as peft builds it: three layers, or an LSTM of two in both directions and two layers."""
    if kind == "mlp":
        return (hidden * inner + inner) + (inner * inner + inner) + (inner * hidden + hidden)
    first, second = (2 * 4 * inner * (width + inner + 2) for width in (hidden, 2 * inner))
    return first + second + (4 * inner * inner + 2 * inner) + (2 * inner * hidden + hidden)
