"""Where in a decoder each weight lies: in which layer, or in what stands around the layers.

Told from the model itself, so that any decoder of transformers with one stack of layers has an answer. Left out:
encoder-decoders, whose two stacks have no common "last layer".
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from align.errors import UserError

Place = int | Literal["embeddings", "norm", "head", "score"]
"""Number of the layer, counted from the input; or what stands before (``embeddings``) and behind the layers."""


def layer_stack(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and modules of the stack of layers; ``UserError`` where there is not exactly one of the config's length."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not _inside_a_list(name)
    ]
    if len(found) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(found)} stacks of {count} layers where one is expected, so layers cannot "
            "be told apart. Take `tuning: {method: full}` without unfreeze, lisa and layer_decay."
        )
    return found[0]


def _inside_a_list(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def places(model: Any) -> dict[str, Place]:
    """The place of every parameter of a causal model or sequence classifier, by the parameter's name.

    A head that is tied to the embeddings is one tensor with them, called and placed as these.
    """
    stack, _ = layer_stack(model)
    output = model.get_output_embeddings()
    head = set() if output is None else {id(p) for p in output.parameters()}
    inner = model.get_input_embeddings()
    embedded = {id(p) for p in inner.parameters()}
    found: dict[str, Place] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{stack}."):
            found[name] = int(name.removeprefix(f"{stack}.").split(".")[0])
        elif id(parameter) in embedded:
            found[name] = "embeddings"
        elif id(parameter) in head:
            found[name] = "head"
        elif name.startswith("score."):
            found[name] = "score"
        else:  # the last norm, or what is added to the embeddings (positions)
            found[name] = "norm" if parameter.dim() == 1 else "embeddings"
    return found


def tied_head(model: Any) -> bool:
    """Whether the vocabulary head is the embeddings' tensor."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight
