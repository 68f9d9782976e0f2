"""Functions that a YAML names as ``package.module:function``: loading, and identity in keys. Torch-free."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from align.config.shipped import shipped_root
from align.config.validation import suggest
from align.errors import UserError
from align.store.fingerprint import code_identity, file_digest

CHECKERS = "align.data.checkers"
"""Module of align's own functions, which are identified by its ``VERSION``, not by its source."""
SHORT = {
    "gold": f"{CHECKERS}:gold",
    "gsm8k_answer": f"{CHECKERS}:gsm8k_answer",
    "reasoning_gym": "align.data.families.gym_tasks:verified",
}
"""Short names of align's own functions."""


SEARCH = threading.RLock()
"""Held while modules are searched for: ``importlib.invalidate_caches`` fails where two threads call it at once."""
FOLDERS = "ALIGN_MODULE_FOLDERS"
"""Environment variable with the folders of the YAML files that were read, for the processes of their stages."""


def add_module_folder(file: Path) -> None:
    """Have modules in the folder of a YAML file found, here and in processes that this one starts.

    Shipped files name modules from the folder above theirs: ``examples.scorers``. Without a file the search path stays
    the same.
    """
    if not os.path.isfile(file):
        return
    root = shipped_root()
    folders = [file.parent.absolute(), *([root] if root in file.absolute().parents else [])]
    add_module_folders([str(folder) for folder in folders if folder != Path.cwd()])


def add_module_folders(folders: Iterable[str]) -> None:
    """Have modules in these folders found, here and in processes that this one starts."""
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
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
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
