"""What a user's function depends on, as far as its imports say: its own file, and the user's modules behind it.

Nothing of the user's is run: import statements are read from the source. Torch-free. Left out: modules imported by a
name that is computed (``importlib.import_module(name)``), and files that the code opens.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, packages_distributions
from pathlib import Path

from align.errors import UserError
from align.store.fingerprint import digest, file_digest

SUFFIXES = (".py", *EXTENSION_SUFFIXES)
OWN = "align"
"""Its modules are not read: versions of stages and of checkers say when they mean something else."""
INSTALLED = {"site-packages", "dist-packages"}


def code_identity(module: str) -> str:
    """Digest of a module's source and of every module that it imports, also through others.

    Modules of the user's enter by content: those of the same top-level package, and those that are not installed, such
    as files beside it. Installed packages enter by version, the standard library not at all. Raises ``UserError`` for
    source that is no Python.
    """
    return digest(_Imports(module).collect())


class _Imports:
    """The modules behind one, each looked at once."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.root = module.partition(".")[0]
        self.identities: dict[str, str] = {}
        """Module -> digest of its file; installed package -> version."""
        self._places: dict[str, list[Path] | None] = {}

    def collect(self) -> dict[str, str]:
        """Everything that ``module`` needs, itself included."""
        pending = [self.module]
        seen: set[str] = set()
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            pending += self._look_at(name)
        return self.identities

    def _look_at(self, name: str) -> list[str]:
        """Note one module; returns the modules that it names."""
        top, _, rest = name.partition(".")
        if top == OWN:
            return []
        places = self._user_places(top)
        if places is None:
            return []
        file = _file_of(places, rest)
        parents = [name.rpartition(".")[0]] if rest else []
        if file is None:  # an attribute of its parent, or a folder without a file of its own
            return parents
        self.identities[name] = file_digest(file)
        if file.suffix != ".py":
            return parents
        package = name if file.stem == "__init__" else name.rpartition(".")[0]
        return [*parents, *_named_in(file, package)]

    def _user_places(self, top: str) -> list[Path] | None:
        """Where a top-level name of the user's lies; None for one that is read no further."""
        if top not in self._places:
            self._places[top] = self._find(top)
        return self._places[top]

    def _find(self, top: str) -> list[Path] | None:
        if top in sys.stdlib_module_names:
            return None
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
        if spec is None:  # not there: an import that the code guards, or that fails when it runs
            return None
        places = [Path(place) for place in spec.submodule_search_locations or ()]
        if not places and spec.origin is not None:
            places = [Path(spec.origin)]
        if top != self.root and any(INSTALLED & set(place.parts) for place in places):
            self.identities[f"installed {top}"] = _version(top)
            return None
        return places


def _file_of(places: list[Path], rest: str) -> Path | None:
    """The file of ``top.rest``, where ``places`` is the file of ``top`` or the folders of its package."""
    for place in places:
        if place.is_file():
            return None if rest else place
        inside = place.joinpath(*rest.split(".")) if rest else place
        whole = inside / "__init__.py"
        alone = [inside.with_name(inside.name + suffix) for suffix in SUFFIXES] if rest else []
        file = next((path for path in (whole, *alone) if path.is_file()), None)
        if file is not None:
            return file
    return None


def _named_in(file: Path, package: str) -> Iterator[str]:
    """Modules that a file's import statements name, wherever they stand, and names which may be modules.

    ``package`` is what relative imports start from.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{file}{line}: no Python that can be read ({said}); repair it.") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if node.level else []
            above = parts[: max(0, len(parts) - node.level + 1)] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            if start:
                yield start
                yield from (f"{start}.{alias.name}" for alias in node.names if alias.name != "*")


@cache
def _version(top: str) -> str:
    """The version of the distribution that has a top-level package; empty where none says so."""
    try:
        return importlib.metadata.version(top)
    except PackageNotFoundError:
        names = _distributions().get(top, [])
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names)))


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())
