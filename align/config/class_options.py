"""Fields of a dataclass in an installed package, read from its source without importing the package. Torch-free.

Importing trl, peft or transformers takes seconds and torch. Parsing the source with ``ast`` takes milliseconds and
follows the installed version. The tests compare the result with the imported classes.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.validation import hint_nearest

EXPORTS: dict[str, tuple[str, str, str]] = {
    "TrainingArguments": ("transformers", "training_args.py", "TrainingArguments"),
    "PushToHubMixin": ("transformers", "utils/hub.py", "PushToHubMixin"),
}
"""Base classes that are imported from a package's root, with the package, file and class that define them."""
PACKAGES = ("trl", "transformers", "peft", "align")
"""Packages whose base classes are followed, besides the class's own package."""

_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "dict": (dict,),
    "list": (list,),
    "None": (type(None),),
}


@dataclass(frozen=True)
class Option:
    """One field of a config class, with its annotation as written and the choices that its metadata lists."""

    name: str
    annotation: str
    choices: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether ``value`` has a type that the annotation names; True if it names any type but plain ones."""
        # Only the outer type is checked: ``list[int]`` accepts any list.
        names = [part.strip().split("[")[0] for part in _split_union(self.annotation)]
        if any(name not in _PLAIN_TYPES for name in names):
            return True
        if isinstance(value, bool):  # a bool is an int in Python, but not for the author of a YAML file
            return "bool" in names
        return any(isinstance(value, _PLAIN_TYPES[name]) for name in names)

    def check(self, value: Any) -> None:
        """Raise ``ValueError`` for a value of the wrong type or outside the choices."""
        if not self.accepts(value):
            raise ValueError(f"'{self.name}' should be {self.annotation}; found {value!r}.")
        if self.choices and value not in self.choices:
            raise ValueError(f"'{self.name}' should be one of {', '.join(map(repr, self.choices))}; found {value!r}.")


def find_option(options: Mapping[str, Option], name: str, owner: str) -> Option:
    """Return an option by its name; raise ``ValueError`` with the nearest name if ``owner`` has no such option."""
    option = options.get(name)
    if option is None:
        hint = hint_nearest(name, options)
        raise ValueError(f"unknown key '{name}': {owner} has no such option.{hint}")
    return option


@functools.cache
def class_options(package: str, file: str, class_name: str) -> dict[str, Option]:
    """Return every field of a dataclass in a package's source by name, those of its base classes included.

    Raises ``LookupError`` if the installed source does not have the class there.
    """
    path = package_folder(package) / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    definition = next(classes, None)
    if definition is None:
        source = _find_base(tree, class_name, package, file)
        if source in (None, (package, file, class_name)):
            raise LookupError(f"{path} has no class {class_name}; this version of {package} is not one align knows.")
        return class_options(*source)  # a package that exports a class of one of its modules
    options: dict[str, Option] = {}
    # ``@arguments_of(Settings)`` gives a class the fields of ``Settings`` (``align.rl.arguments``).
    settings = [
        argument
        for decorator in definition.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "arguments_of"
        for argument in decorator.args
    ]
    # Base classes first, so that a field that is redefined below them wins.
    for base in [*definition.bases, *settings]:
        place = _find_base(tree, ast.unparse(base).rpartition(".")[2], package, file)
        if place is not None:
            options |= class_options(*place)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, annotation = node.target.id, ast.unparse(node.annotation)
            # ClassVar and underscore names are no dataclass options, nor are fields with init=False
            if not name.startswith("_") and "ClassVar" not in annotation and not _has_no_init(node.value):
                options[name] = Option(name, annotation, _choices(node.value))
    return options


def package_folder(package: str) -> Path:
    """Return the folder of a top-level package without running its code; raise ``LookupError`` if not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"the package {package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _find_base(tree: ast.Module, name: str, package: str, file: str) -> tuple[str, str, str] | None:
    """Return package, file and name of the base class ``name``; None for one that has no options.

    It is in this file, in the module that this file imports it from, or a known export.
    """
    if name in EXPORTS:
        return EXPORTS[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return package, file, name
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                # A relative import: one dot is the file's own folder, each further dot one folder up.
                parents = Path(file).parts[: -node.level]
                return package, module_file(package, [*parents, *parts]), name
            if parts and parts[0] in (*PACKAGES, package):
                return parts[0], module_file(parts[0], parts[1:]), name
    return None


def module_file(package: str, submodules: Sequence[str]) -> str:
    """Return the file of a module in a package, relative to the package's folder; the module need not be there."""
    path = "/".join(submodules)
    if not submodules or (package_folder(package) / path).is_dir():
        return f"{path}/__init__.py".lstrip("/")
    return f"{path}.py"


def _has_no_init(value: ast.expr | None) -> bool:
    """Return whether a field's value is ``field(init=False, ...)``."""
    return isinstance(value, ast.Call) and any(
        keyword.arg == "init" and isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        for keyword in value.keywords
    )


def _choices(value: ast.expr | None) -> tuple[Any, ...]:
    """Return the literals under ``metadata={"choices": [...]}``; empty if there are none."""
    for keyword in value.keywords if isinstance(value, ast.Call) else []:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, item in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices":
                    try:
                        return tuple(ast.literal_eval(item))
                    except (ValueError, TypeError):
                        return ()
    return ()


def _split_union(annotation: str) -> list[str]:
    """Split ``dict[str, Any] | str | None`` at the bars outside brackets."""
    members, depth, start = [], 0, 0
    for index, char in enumerate(annotation):
        depth += (char == "[") - (char == "]")
        if char == "|" and depth == 0:
            members.append(annotation[start:index])
            start = index + 1
    return [*members, annotation[start:]]
