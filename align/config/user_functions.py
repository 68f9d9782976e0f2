"""Functions and classes that a YAML names as ``package.module:name``: import, identity in keys, arguments. Torch-free.

At loading, arguments and methods are read from the source, so no code of the user's runs. Code whose source does not
show them (decorated, imported from elsewhere, made at run time) is checked when its stage has imported it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from align.config.shipped import shipped_root
from align.config.validation import hint_nearest, suggest
from align.errors import UserError
from align.registry import Score, registered
from align.store.fingerprint import code_identity, file_digest

CHECKERS = "align.data.checkers"
"""Module of align's own functions, which are identified by its ``VERSION``, not by its source."""
SHORT = {score.name: score.function for score in registered(Score).values()}
"""Short names of functions that score."""


SEARCH = threading.RLock()
"""Held while modules are searched for: ``importlib.invalidate_caches`` fails where two threads call it at once."""
FOLDERS = "ALIGN_MODULE_FOLDERS"
"""Environment variable with the folders of the YAML files that were read, for the processes of their stages."""


def add_module_folder(file: Path) -> None:
    """Have modules in the folder of a YAML file found, here and in processes that this process starts.

    Shipped files name modules from the folder above theirs: ``examples.scorers``. Without a file the search path stays
    the same.
    """
    if not os.path.isfile(file):
        return
    root = shipped_root()
    folders = [file.parent.absolute(), *([root] if root in file.absolute().parents else [])]
    add_module_folders([str(folder) for folder in folders if folder != Path.cwd()])


def add_module_folders(folders: Iterable[str]) -> None:
    """Have modules in these folders found, here and in processes that this process starts."""
    known_folders = module_folders()
    added = [folder for folder in folders if folder not in known_folders]
    if added:
        os.environ[FOLDERS] = os.pathsep.join([*known_folders, *added])
    search_module_folders()


def module_folders() -> list[str]:
    """Return the folders of the YAML files that were read, for tasks that do not inherit the environment."""
    return [folder for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]


def search_module_folders() -> None:
    """Append the folders of YAML files to the search path: what they hold hides no installed module."""
    for folder in module_folders():
        if folder not in sys.path:
            sys.path.append(folder)


def load_function(path: str, role: str = "score") -> Callable[..., Any]:
    """Import the function ``module:name``; raise ``UserError``, which begins with its ``role``, if there is none."""
    full = full_path(path, role)
    module_name, _, name = full.partition(":")
    _find(full, role)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{role} '{path}': importing {module_name} failed: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        names = [key for key in functions if not key.startswith("_")]
        raise UserError(f"{role} '{path}': {module_name} has no function '{name}'.{suggest(name, names)}")
    return cast(Callable[..., Any], function)


def function_identity(path: str, role: str = "score") -> str:
    """Return a function's identity for keys: the version of align's own functions, the code of any other.

    The code is the code of its module and of the user's modules that the module imports
    (``align.store.fingerprint``). Does not import the module, only its parent packages. Raises ``UserError``, which
    begins with the function's ``role``, if there is no such function.
    """
    full = full_path(path, role)
    origin = _find(full, role)
    module = full.partition(":")[0]
    if module == CHECKERS:
        # align's checkers have a version, so a reformatted file does not run stages again.
        return f"{full} version {importlib.import_module(module).VERSION}"
    if module.partition(".")[0] == "align":
        return f"{full} sha256:{file_digest(origin)}"
    try:
        return f"{full} sha256:{code_identity(module)}"
    except UserError as error:
        raise UserError(f"{role} '{full}': {error}") from None


def full_path(path: str, role: str) -> str:
    """Return ``module:name`` for a path or a short name; raise ``UserError`` for anything else."""
    full = SHORT.get(path, path)
    module, colon, name = full.partition(":")
    if not (module and colon and name):
        raise UserError(f"{role} '{path}': expected 'gold' or 'module:name'.{suggest(path, SHORT)}")
    return full


def _find(full: str, role: str) -> Path:
    """Return the module's file; the search includes the current folder, like ``python -m``, and YAML files' folders."""
    module = full.partition(":")[0]
    with SEARCH:
        directory = str(Path.cwd())
        if directory not in sys.path and "" not in sys.path:
            sys.path.insert(0, directory)
        search_module_folders()
        importlib.invalidate_caches()
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(
            f"{role} '{full}': there is no module '{module}'; write it as package.module:function, in the "
            "current folder, in the folder of the YAML file or of a file that it extends, or installed."
        )
    return Path(spec.origin)


POSITIONAL = 2
"""Arguments that the caller passes by position: rows and responses, or a row and a response."""
_POSITIONAL_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a function by name, without those that it gets by position."""

    names: tuple[str, ...]
    required: frozenset[str]
    takes_any: bool
    """True with ``**options``."""

    def check(
        self,
        arguments: Collection[str],
        function: str,
        place: str,
        field: str = "function",
        provided: Collection[str] | None = None,
    ) -> None:
        """Raise ``UserError``, which begins with ``place``, for an unknown argument and for a missing argument.

        ``field`` is the YAML's field that names the function, or the class. The YAML has the arguments in a block
        ``arguments``, or, if ``provided`` is not None, next to that field. ``provided`` are passed by the stage.
        """
        block = ".arguments" if provided is None else ""
        for name in arguments:
            if name not in self.names and not self.takes_any:
                remedy = suggest(name, self.names) or " It takes none that a YAML could set."
                raise UserError(f"{place}{block}: {function} has no argument '{name}'.{remedy}")
        missing = sorted(self.required - set(arguments) - set(provided or ()))
        if missing:
            written = f"{missing[0]}: ..." if provided is not None else f"arguments: {{{missing[0]}: ...}}"
            raise UserError(
                f"{place}: {function} needs {', '.join(missing)}; write `{written}` next to `{field}:`, or give it a "
                "default."
            )


def check_arguments(
    path: str,
    arguments: Mapping[str, Any],
    place: str,
    positional: int = POSITIONAL,
    provided: Collection[str] | None = None,
) -> None:
    """Check a function's arguments as far as its source shows them.

    A missing module is reported when it is imported. ``positional`` is the number of parameters that the caller passes
    by position, ``provided`` as in ``Parameters.check``. Raises ``UserError``, which begins with ``place``, for a
    function that is not in its module, an unknown argument, and a missing argument.
    """
    module, _, name = full_path(path, place).partition(":")
    tree = read_module(module, path, place)
    if tree is None:
        return
    definition = _find_definition(tree, name)
    if definition is not None:
        if not definition.decorator_list:
            parameters_of(definition.args, positional).check(arguments, name, place, provided=provided)
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
    provided: Collection[str] | None = None,
) -> None:
    """Check the arguments of an imported function, or class; raise ``UserError`` as ``check_arguments`` does."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C, without a signature
    parameters = list(signature.parameters.values())
    by_position = [parameter.name for parameter in parameters if parameter.kind in _POSITIONAL_KINDS][:positional]
    nameable = [parameter for parameter in parameters if parameter.kind in _NAMED_KINDS]
    by_name = [parameter for parameter in nameable if parameter.name not in by_position]
    Parameters(
        names=tuple(parameter.name for parameter in by_name),
        required=frozenset(parameter.name for parameter in by_name if parameter.default is inspect.Parameter.empty),
        takes_any=any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters),
    ).check(arguments, name, place, field, provided)


def parameters_of(arguments: ast.arguments, positional: int) -> Parameters:
    """Return the parameters of a definition without the first ``positional`` parameters."""
    all_names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    names = all_names[positional:]
    # Defaults belong to the last of these parameters.
    without_default = set(all_names[: len(all_names) - len(arguments.defaults)])
    keyword_only = [argument.arg for argument in arguments.kwonlyargs]
    needed = {name for name, default in zip(keyword_only, arguments.kw_defaults, strict=True) if default is None}
    return Parameters(
        names=(*names, *keyword_only),
        required=frozenset((without_default & set(names)) | needed),
        takes_any=arguments.kwarg is not None,
    )


def _find_definition(tree: ast.Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the last definition of a function at the top level of a module; it overrides earlier definitions."""
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


PLAIN_BASES = frozenset({"object", "ABC", "Protocol", "Generic"})
"""Bases that add no method of a user's."""
PROPERTIES = frozenset({"property", "cached_property", "setter", "deleter"})
"""Decorators of functions that are not methods."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NO_PARAMETERS = Parameters(names=(), required=frozenset(), takes_any=False)
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


def method_names(path: str, place: str) -> list[str]:
    """Return the methods of a class and its bases that the source shows.

    Raises ``UserError`` as ``check_class`` does.
    """
    lineage = _find_class(path, place) or []
    names: dict[str, None] = {}
    functions = [child for node in reversed(lineage) for child in node.body if isinstance(child, FUNCTIONS)]
    for function in functions:
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list}
        if not decorators & PROPERTIES:
            names[function.name] = None
    return list(names)


def check_methods(path: str, methods: Collection[str], required: Collection[str], place: str) -> None:
    """Raise ``UserError``, which begins with ``place``, for a class that lacks a ``required`` method."""
    for method in required:
        if method not in methods and "__getattr__" not in methods:
            hint = hint_nearest(method, [name for name in methods if not name.startswith("_")])
            raise UserError(f"{place} '{path}': the class has no method '{method}'.{hint or REMEDIES.get(method, '')}")


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
