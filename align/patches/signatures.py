"""Check that a private name of another package is still what a patch expects."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from align.errors import UserError


def private_name(package: str, path: str, parameters: Sequence[str] | None = None) -> Any:
    """Return a private object of another package after checking that it has not changed.

    Args:
        package: Name of the distribution, for the error's version.
        path: Module and attributes, such as ``trl.trainer.utils:_use_triton``.
        parameters: Names of the function's parameters in order. ``None`` only checks that the name exists.

    Raises:
        UserError: if the name is missing or has other parameters.
    """
    module, _, attributes = path.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            value = getattr(value, attribute)
    except (ImportError, AttributeError):
        raise UserError(f"{_version(package)} has no {path}. {_remedy(package)}") from None
    if parameters is not None:
        actual = list(inspect.signature(value).parameters)
        if actual != list(parameters):
            raise UserError(
                f"{_version(package)}: {path} has the parameters ({', '.join(actual)}), and align expects "
                f"({', '.join(parameters)}). {_remedy(package)}"
            )
    return value


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _remedy(package: str) -> str:
    return f"Install the version of {package} that align's constraints.txt names."


def frame_of(thread: threading.Thread) -> FrameType | None:
    """Return the frame that a thread runs now. Python documents ``sys._current_frames`` in spite of its name."""
    return sys._current_frames().get(thread.ident or 0)
