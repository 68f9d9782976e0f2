"""Arguments that a YAML gives to a user's function, checked against its signature. Torch-free.

At loading, the signature is read from the source, so no code of the user's runs. A function whose source does not show
the signature (decorated, imported from elsewhere, made at run time) is checked when its stage has imported it.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.user_functions import full_path
from align.config.validation import suggest
from align.errors import UserError

POSITIONAL = 2
"""Arguments that the caller passes by position: rows and responses, or a row and a response."""
_POSITIONAL_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a function by name, without those that it gets by position."""

    known: tuple[str, ...]
    required: frozenset[str]
    takes_any: bool
    """True with ``**options``."""

    def check(self, arguments: Collection[str], function: str, place: str, field: str = "function") -> None:
        """Raise ``UserError``, which begins with ``place``, for an unknown argument and for a missing one.

        ``field`` is the YAML's field that names the function, or the class.
        """
        for name in arguments:
            if name not in self.known and not self.takes_any:
                remedy = suggest(name, self.known) or " It takes none that a YAML could set."
                raise UserError(f"{place}.arguments: {function} has no argument '{name}'.{remedy}")
        missing = sorted(self.required - set(arguments))
        if missing:
            raise UserError(
                f"{place}: {function} needs {', '.join(missing)}; write `arguments: {{{missing[0]}: ...}}` beside "
                f"`{field}:`, or give it a default."
            )


def check_arguments(path: str, arguments: Mapping[str, Any], place: str, positional: int = POSITIONAL) -> None:
    """Check a function's arguments as far as its source shows them.

    A missing module is reported when it is imported. ``positional`` is the number of parameters that the caller passes
    by position. Raises ``UserError``, which begins with ``place``, for a function that is not in its module, an unknown
    argument, and a missing argument.
    """
    module, _, name = full_path(path, place).partition(":")
    tree = read_module(module, path, place)
    if tree is None:
        return
    definition = _find_definition(tree, name)
    if definition is not None:
        if not definition.decorator_list:
            parameters_of(definition.args, positional).check(arguments, name, place)
        return
    names = top_level_names(tree)
    if names is not None and name not in names:
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        raise UserError(f"{place} '{path}': {module} has no function '{name}'.{suggest(name, functions)}")


def read_module(module: str, path: str, place: str) -> ast.Module | None:
    """Return the parsed source of a module; None if the module is missing or has no source.

    Raises ``UserError``, which begins with ``place``, for source that is not valid Python.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return ast.parse(Path(spec.origin).read_bytes())
    except SyntaxError as error:
        raise UserError(f"{place} '{path}': {spec.origin}, line {error.lineno}: {error.msg}.") from None


def check_call(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    name: str,
    place: str,
    positional: int = POSITIONAL,
    field: str = "function",
) -> None:
    """Check the arguments of an imported function, or class; raise ``UserError`` as ``check_arguments`` does."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C, without a signature
    parameters = list(signature.parameters.values())
    by_position = [parameter.name for parameter in parameters if parameter.kind in _POSITIONAL_KINDS][:positional]
    named = [
        parameter for parameter in parameters if parameter.kind in _NAMED_KINDS and parameter.name not in by_position
    ]
    Parameters(
        known=tuple(parameter.name for parameter in named),
        required=frozenset(parameter.name for parameter in named if parameter.default is inspect.Parameter.empty),
        takes_any=any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters),
    ).check(arguments, name, place, field)


def parameters_of(arguments: ast.arguments, positional: int) -> Parameters:
    """Return the parameters of a definition without the first ``positional`` ones."""
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    named = names[positional:]
    # Defaults belong to the last of these parameters.
    without_default = set(names[: len(names) - len(arguments.defaults)])
    keyword_only = [argument.arg for argument in arguments.kwonlyargs]
    needed = {name for name, default in zip(keyword_only, arguments.kw_defaults, strict=True) if default is None}
    return Parameters(
        known=(*named, *keyword_only),
        required=frozenset((without_default & set(named)) | needed),
        takes_any=arguments.kwarg is not None,
    )


def _find_definition(tree: ast.Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the last definition of a function at the top level of a module, which overrides earlier ones."""
    for node in reversed(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return node
    return None


def top_level_names(tree: ast.Module) -> set[str] | None:
    """Return the names that a module defines; None if its source does not show all of them."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            return None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return None if names & {"__getattr__", "globals"} else names
