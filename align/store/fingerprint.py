"""Digests: of strings, files and folders, and of the code of a user's function."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, packages_distributions
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.errors import UserError

CHUNK_BYTES = 1 << 20


def canonical(value: Any) -> str:
    """Return canonical JSON: sorted keys, no spaces, ASCII; equal values give equal text on every machine.

    Raises ``TypeError`` for what has no stable identity (paths, objects, functions, sets) and ``ValueError``
    for NaN and infinities.
    """
    return json.dumps(_plain(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, 64 hex digits."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        # The state before the first byte is read: a change from here on shows.
        for states in _watchers:
            states[str(path.absolute())] = file_state(os.fstat(file.fileno()))
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def file_state(stat: os.stat_result) -> list[int]:
    """Return numbers that differ after any change of a file, also one that sets the old time again.

    Programs can set the modification time, but not the time of the last change of the inode (``ctime``).
    """
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


_watchers: list[dict[str, list[int]]] = []


@contextlib.contextmanager
def watch_digests() -> Iterator[dict[str, list[int]]]:
    """Collect the state of each file of data that is digested inside: absolute path → ``file_state``.

    Source code is not collected. It is read once, when it is imported.
    """
    states: dict[str, list[int]] = {}
    _watchers.append(states)
    try:
        yield states
    finally:
        _watchers.remove(states)
        for path in [path for path in states if path.endswith(SUFFIXES)]:
            del states[path]


def _plain(value: Any, where: str) -> Any:
    """Return ``value`` as JSON types. ``where`` is its path, for messages."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="python"), where)
    if isinstance(value, str):
        return str(value)  # also a string enum's
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        # JSON has no NaN, and NaN equals nothing, itself included.
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} has no canonical form")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: the key {key!r} is {type(key).__name__}; only text keys are stable")
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where}: {type(value).__name__} has no stable identity")


SUFFIXES = (".py", *EXTENSION_SUFFIXES)
ALIGN = "align"
"""Its modules are not read: versions of stages and of checkers say when they change meaning."""
INSTALLED = {"site-packages", "dist-packages"}


def code_identity(module: str) -> str:
    """Return the digest of a module's source and of every module that it imports, directly or not.

    The user's modules enter by content: those of the same top-level package, and those that are not installed, such as
    files next to it. Installed packages enter by version, the standard library not at all. Raises ``UserError`` for
    source that is no Python.
    """
    return digest(_Imports(module).collect())


class _Imports:
    """The modules that one module needs, each read once."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.root = module.partition(".")[0]
        self.identities: dict[str, str] = {}
        """Module → digest of its file; installed package → version."""

    def collect(self) -> dict[str, str]:
        """Return the identities of everything that ``module`` needs, itself included."""
        pending = [self.module]
        visited: set[str] = set()
        while pending:
            name = pending.pop()
            if name in visited:
                continue
            visited.add(name)
            pending += self._visit(name)
        return self.identities

    def _visit(self, name: str) -> list[str]:
        """Add one module's identity; returns the modules that it names."""
        top, _, rest = name.partition(".")
        if top == ALIGN:
            return []
        places = self._find(top)
        if places is None:
            return []
        file = _file_of(places, rest)
        # Importing a.b runs a/__init__.py as well.
        parents = [name.rpartition(".")[0]] if rest else []
        if file is None:  # an attribute of its parent, or a folder without its own file
            return parents
        self.identities[name] = file_digest(file)
        # A compiled module counts by its bytes. What it imports cannot be read from them.
        if file.suffix != ".py":
            return parents
        # Relative imports start at the package: the module itself, or the module that contains it.
        package = name if file.stem == "__init__" else name.rpartition(".")[0]
        return [*parents, *_imported_names(file, package)]

    def _find(self, top: str) -> list[Path] | None:
        """Return the locations of a top-level name of the user's; None if it is read no further."""
        if top in sys.stdlib_module_names:
            return None
        try:
            # For a top-level name this only looks for the file; it runs nothing.
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
        if spec is None:  # missing: an import that the code guards, or that fails when it runs
            return None
        places = [Path(place) for place in spec.submodule_search_locations or ()]
        if not places and spec.origin is not None:
            places = [Path(spec.origin)]
        # A package installed by pip: its version identifies its content. An editable install is elsewhere and is read.
        if top != self.root and any(INSTALLED & set(place.parts) for place in places):
            self.identities[f"installed {top}"] = _version(top)
            return None
        return places


def _file_of(places: list[Path], rest: str) -> Path | None:
    """Return the file of ``top.rest``, where ``places`` is the file of ``top`` or the folders of its package."""
    for place in places:
        if place.is_file():
            return None if rest else place
        inside = place.joinpath(*rest.split(".")) if rest else place
        # As in an import, a package goes before a module of the same name.
        candidates = [inside / "__init__.py"]
        if rest:
            candidates += [inside.with_name(inside.name + suffix) for suffix in SUFFIXES]
        for file in candidates:
            if file.is_file():
                return file
    return None


def _imported_names(file: Path, package: str) -> Iterator[str]:
    """Yield the modules that a file's import statements name, anywhere in it, and names that may be modules.

    ``package`` is the package that relative imports start from.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{file}{line}: cannot be read as Python ({reason}); repair it.") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = _import_source(node, package)
            if start:
                yield start
                # ``from a import b`` may name a module ``a.b``; a name that is not a module has no file and is skipped.
                yield from (f"{start}.{alias.name}" for alias in node.names if alias.name != "*")


def _import_source(node: ast.ImportFrom, package: str) -> str:
    """Return the absolute name of the module that a ``from`` import reads; empty for one above the top."""
    parts = package.split(".")
    parents = parts[: max(0, len(parts) - node.level + 1)] if node.level else []
    return ".".join([*parents, *filter(None, [node.module])])


@cache
def _version(top: str) -> str:
    """Return the version of the distribution with a top-level package; empty if there is none."""
    try:
        return importlib.metadata.version(top)
    except PackageNotFoundError:
        names = _distributions().get(top, [])
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names)))


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())
