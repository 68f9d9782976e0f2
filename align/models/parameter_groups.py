"""Group the parameters of a decoder by layer, embeddings, norm and heads.

The groups are read off the model itself, which works for any decoder of transformers with one stack of layers. Left
out: encoder-decoders, whose two stacks have no common last layer.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from align.errors import UserError

ParameterGroup = int | Literal["embeddings", "norm", "head", "score"]
"""Index of a layer, counted from the input; or the name of a part before (``embeddings``) or after the layers."""


def layer_stack(model: Any) -> tuple[str, nn.ModuleList]:
    """Return name and modules of the stack of layers; ``UserError`` unless exactly one has the config's length."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    # Nested lists, such as experts inside a layer, are not stacks of layers.
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not _inside_a_list(name)
    ]
    if len(stacks) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(stacks)} stacks of {count} layers where one is expected, so layers "
            "cannot be told apart. Take `tuning: {method: full}` without unfreeze, lisa and layer_decay."
        )
    return stacks[0]


def _inside_a_list(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def parameter_groups(model: Any) -> dict[str, ParameterGroup]:
    """Return the group of every parameter of a causal model or sequence classifier, by the parameter's name.

    A head that is tied to the embeddings is the same tensor, and belongs to the embeddings.
    """
    stack, _ = layer_stack(model)
    output = model.get_output_embeddings()
    head_ids = set() if output is None else {id(p) for p in output.parameters()}
    embeddings = model.get_input_embeddings()
    embedding_ids = {id(p) for p in embeddings.parameters()}
    groups: dict[str, ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{stack}."):
            groups[name] = int(name.removeprefix(f"{stack}.").split(".")[0])
        elif id(parameter) in embedding_ids:
            groups[name] = "embeddings"
        elif id(parameter) in head_ids:
            groups[name] = "head"
        elif name.startswith("score."):
            groups[name] = "score"
        elif parameter.dim() == 1:
            groups[name] = "norm"
        else:  # position embeddings
            groups[name] = "embeddings"
    return groups


def has_tied_head(model: Any) -> bool:
    """Return True where the vocabulary head is the embeddings' tensor."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight
