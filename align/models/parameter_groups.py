"""Group the parameters of a decoder by layer, embeddings, norm and heads, and freeze some of them by pattern.

The groups are read off the model itself, which works for any decoder of transformers with one stack of layers.
Encoder-decoders are not supported, because their two stacks have no common last layer.

Patterns are globs over dotted names, not regular expressions: there ``layers.1.`` would also match layer 10.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Sequence
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from align.errors import UserError

ParameterGroup = int | Literal["embeddings", "norm", "head", "score"]
"""Index of a layer, counted from the input; or the name of a part before (``embeddings``) or after the layers."""


def layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return name and modules of the stack of layers; ``UserError`` unless exactly one has the config's length."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    # Nested lists, such as experts inside a layer, are not stacks of layers.
    outer_lists = [(name, module) for name, module in lists if not _inside_a_list(name)]
    stacks = [(name, module) for name, module in outer_lists if len(module) == count]
    if len(stacks) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(stacks)} stacks of {count} layers where one is expected, so layers "
            "cannot be told apart. Use `tuning: {method: full}` without unfreeze, lisa and layer_decay."
        )
    return stacks[0]


def _inside_a_list(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def parameter_groups(model: PreTrainedModel) -> dict[str, ParameterGroup]:
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


def has_tied_head(model: PreTrainedModel) -> bool:
    """Return True if the vocabulary head is the embeddings' tensor."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def freeze(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Freeze every parameter that any of ``patterns`` matches, and return their names.

    A pattern matches a parameter, or a module and thus all parameters below it. Raises ``UserError`` for a pattern
    without a match, and when no parameter is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if matches(pattern, name)]
        if not matched:
            raise UserError(f"tuning.freeze: no weight is called '{pattern}'.{_nearest(model, pattern, names)}")
        frozen.update(matched)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"tuning.freeze: {', '.join(patterns)} name every weight, so nothing is left to train.")
    return [name for name in names if name in frozen]


def matches(pattern: str, name: str) -> bool:
    """Return True where ``pattern`` matches the parameter ``name`` or a module above it."""
    parts = name.split(".")
    prefixes = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(prefix, glob) for glob in expand(pattern) for prefix in prefixes)


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does, without nesting: ``a{0..2}b`` -> a0b, a1b, a2b; ``{x,y}`` -> x, y."""
    # The split alternates between text outside braces and the contents of braces.
    pieces = BRACES.split(pattern)
    options = [[piece] if index % 2 == 0 else _choices(piece) for index, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*options)]


def _choices(inside: str) -> list[str]:
    span = RANGE.fullmatch(inside.strip())
    if span is None:
        return [choice.strip() for choice in inside.split(",")]
    first = int(span[1])
    last = int(span[2])
    return [str(number) for number in range(first, last + 1)]


def _nearest(model: PreTrainedModel, pattern: str, names: list[str]) -> str:
    modules = {name for name, _ in model.named_modules() if name}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and "head" in pattern and not any(matches(pattern, name) for name in names):
        tied = output.weight is model.get_input_embeddings().weight
        if tied:
            embedded = next(n for n, p in model.named_parameters() if p is output.weight)
            return f" This model's head is tied to its embeddings: freeze '{embedded}'."
    close = difflib.get_close_matches(pattern, [*modules, *names], n=1)
    return f" Did you mean '{close[0]}'?" if close else f" The first ones are {', '.join(names[:3])}."
