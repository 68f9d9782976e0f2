"""Freeze parameters by pattern.

Patterns are globs over dotted names, not regular expressions: there ``layers.1.`` would also match layer 10.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Sequence
from typing import Any

from align.errors import UserError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def freeze(model: Any, patterns: Sequence[str]) -> list[str]:
    """Freeze every parameter that one of ``patterns`` matches, and return their names.

    A pattern matches a parameter, or a module and thus all parameters below it. Raises ``UserError`` for a pattern that
    matches nothing, and when no parameter is left to train.
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
    first, last = int(span[1]), int(span[2])
    return [str(number) for number in range(first, last + 1)]


def _nearest(model: Any, pattern: str, names: list[str]) -> str:
    modules = {name for name, _ in model.named_modules() if name}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and "head" in pattern and not any(matches(pattern, name) for name in names):
        tied = output.weight is model.get_input_embeddings().weight
        if tied:
            embedded = next(n for n, p in model.named_parameters() if p is output.weight)
            return f" This model's head is tied to its embeddings: freeze '{embedded}'."
    close = difflib.get_close_matches(pattern, [*modules, *names], n=1)
    return f" Did you mean '{close[0]}'?" if close else f" The first ones are {', '.join(names[:3])}."
