"""Docstrings of configuration fields, read from the source when somebody asks for them.

pydantic would read and parse the source of every class at its import, which took a third of the time of ``align plan``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator

from pydantic import BaseModel


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings of a model's fields by the field's name.

    An inherited field has the docstring of the class that defines it. A ``description`` in a field's ``Field(...)``
    takes precedence. The result is empty for a class without source.
    """
    docstrings = {}
    for name, field in model.model_fields.items():
        text = field.description or _docstring_of(model, name)
        if text:
            docstrings[name] = text
    return docstrings


def _docstring_of(model: type[BaseModel], name: str) -> str | None:
    """Return the docstring that follows the field in the class that declares it last."""
    for declaring in model.__mro__:
        if name in vars(declaring).get("__annotations__", {}):
            return _module_docstrings(declaring.__module__).get(declaring.__qualname__, {}).get(name)
    return None


@functools.cache
def _module_docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings of a module's classes: the class's qualified name → field → text."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return {}
    return dict(_class_docstrings(ast.parse(source), ""))


def _class_docstrings(node: ast.AST, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield f"{prefix}{child.name}", dict(_attribute_docstrings(child))
            yield from _class_docstrings(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _class_docstrings(child, f"{prefix}{child.name}.<locals>.")
        else:
            yield from _class_docstrings(child, prefix)


def _attribute_docstrings(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Yield each annotated attribute that a text follows, with the text."""
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if not isinstance(following, ast.Expr) or not isinstance(following.value, ast.Constant):
            continue
        if isinstance(following.value.value, str):
            yield statement.target.id, inspect.cleandoc(following.value.value)
