"""Functions that a YAML names as ``package.module:function``: loading them, and their identity in keys. Torch-free."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.config.validation import suggest
from align.errors import UserError
from align.store.code_identity import code_identity
from align.store.fingerprint import file_digest

CHECKERS = "align.data.checkers"
"""Functions of our own; they are identified by their ``VERSION``, not by their source."""
SHORT = {"gold": f"{CHECKERS}:gold", "gsm8k_answer": f"{CHECKERS}:gsm8k_answer"}
"""Short names of functions of our own."""


def load_function(path: str, what: str = "score") -> Callable[..., Any]:
    """The function behind ``module:name``. ``UserError``, which begins with ``what`` it is, where there is none."""
    full = _full(path, what)
    module_name, _, name = full.partition(":")
    _find(full, what)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{what} '{path}': importing {module_name} failed: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{what} '{path}': {module_name} has no function '{name}'.{suggest(name, known)}")
    found: Callable[..., Any] = function
    return found


def function_identity(path: str, what: str = "score") -> str:
    """What a key holds of a verifiable function: align's own by version, another one by its code.

    The code is the module's and that of the user's modules which it imports (``align.store.code_identity``). Imports
    nothing of the module itself (only its parent packages). Raises ``UserError``, which begins with ``what`` it is,
    when there is none.
    """
    full = _full(path, what)
    origin = _find(full, what)
    module = full.partition(":")[0]
    if module == CHECKERS:
        return f"{full} version {importlib.import_module(module).VERSION}"
    if module.partition(".")[0] == "align":
        return f"{full} sha256:{file_digest(origin)}"
    try:
        return f"{full} sha256:{code_identity(module)}"
    except UserError as error:
        raise UserError(f"{what} '{full}': {error}") from None


def _full(path: str, what: str) -> str:
    full = SHORT.get(path, path)
    module, colon, name = full.partition(":")
    if not (module and colon and name):
        raise UserError(f"{what} '{path}': expected 'gold' or 'module:name'.{suggest(path, SHORT)}")
    return full


def _find(full: str, what: str) -> Path:
    """File of the module, looked for in the current directory too, as ``python -m`` does."""
    module = full.partition(":")[0]
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(
            f"{what} '{full}': there is no module '{module}'; write it as package.module:function, importable from the "
            "current directory or installed."
        )
    return Path(spec.origin)
