"""Classes that a YAML names, checked by their source: methods and arguments. Torch-free.

No code of the user's runs. A class whose source does not tell (made at run time, imported from elsewhere, with a base
in another module) is checked when its stage has imported it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from align.config.function_arguments import Parameters, parameters_of, read_module, top_level_names
from align.config.validation import hint_nearest, suggest
from align.errors import UserError

PLAIN_BASES = frozenset({"object", "ABC", "Protocol", "Generic"})
"""Bases that add no method of a user's."""
PROPERTIES = frozenset({"property", "cached_property", "setter", "deleter"})
"""Decorators of functions that are not methods."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NO_PARAMETERS = Parameters(known=(), required=frozenset(), takes_any=False)
REMEDIES = {
    "reset": " Add `reset(self, row)`, which begins an episode and returns its first message.",
    "score": " Add `score(self)`, which returns a number when the episode has ended.",
}
"""Remedies for a class that lacks a method."""


def check_class(path: str, arguments: Mapping[str, Any], required: Collection[str], place: str) -> None:
    """Check a class of the user's by its source, as far as that tells; a missing module is left to who imports it.

    ``required`` are methods that it must have, ``arguments`` the keyword arguments of its ``__init__``. Raises
    ``UserError``, which begins with ``place``.
    """
    lineage = _find_class(path, place)
    if lineage is None:
        return
    check_methods(path, {method for node in lineage for method in _names_in(node)}, required, place)
    if any(node.decorator_list for node in lineage):  # such as a dataclass, whose __init__ is generated
        return
    initializers = (_initializer(node) for node in lineage)
    definition = next((node for node in initializers if node is not None), None)
    if definition is None:
        NO_PARAMETERS.check(arguments, lineage[0].name, place, "class")
    elif not definition.decorator_list:
        parameters_of(definition.args, 1).check(arguments, lineage[0].name, place, "class")


def defines_method(path: str, method: str, place: str) -> bool:
    """Return whether the source of a class shows that it has a method. Raises ``UserError`` as ``check_class`` does."""
    return method in method_names(path, place)


def method_names(path: str, place: str) -> list[str]:
    """Return the methods of a class and its bases that the source shows.

    Raises ``UserError`` as ``check_class`` does.
    """
    lineage = _find_class(path, place) or []
    functions = [child for node in reversed(lineage) for child in node.body if isinstance(child, FUNCTIONS)]
    return list(dict.fromkeys(function.name for function in functions if not _is_property(function)))


def check_methods(path: str, methods: Collection[str], required: Collection[str], place: str) -> None:
    """Raise ``UserError``, which begins with ``place``, for a class that lacks a ``required`` method."""
    for method in required:
        if method not in methods and "__getattr__" not in methods:
            hint = hint_nearest(method, [name for name in methods if not name.startswith("_")])
            raise UserError(f"{place} '{path}': the class has no method '{method}'.{hint or REMEDIES.get(method, '')}")


def _is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorators = [ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list]
    return any(name in PROPERTIES for name in decorators)


def _find_class(path: str, place: str) -> list[ast.ClassDef] | None:
    """Return a class and all its bases, the class first; None if its module's source does not show them.

    Raises ``UserError``, which begins with ``place``, for a module without such a class.
    """
    module, _, name = path.partition(":")
    tree = read_module(module, path, place)
    if tree is None:
        return None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name in classes:
        return _lineage(classes[name], classes)
    names = top_level_names(tree)
    if names is not None and name not in names:
        raise UserError(f"{place} '{path}': {module} has no class '{name}'.{suggest(name, classes)}")
    if any(isinstance(node, FUNCTIONS) and node.name == name for node in tree.body):
        raise UserError(f"{place} '{path}': {name} is a function; name a class, or list functions under `tools`.")
    return None


def _lineage(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> list[ast.ClassDef] | None:
    """Return a class and all its bases, the class first; None if a base is not in the module."""
    lineage = [node]
    for base in node.bases:
        text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base).rpartition(".")[2]
        if text in PLAIN_BASES:
            continue
        parent = classes.get(text)
        above = None if parent is None or parent is node else _lineage(parent, classes)
        if above is None:
            return None
        lineage += above
    return lineage


def _names_in(node: ast.ClassDef) -> Iterator[str]:
    """Yield the names that a class's body defines."""
    for child in ast.walk(node):
        if isinstance(child, FUNCTIONS):
            yield child.name
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id


def _initializer(node: ast.ClassDef) -> ast.FunctionDef | None:
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"]
    return methods[-1] if methods else None
