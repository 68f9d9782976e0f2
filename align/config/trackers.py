"""Check that the experiment trackers of ``runtime.report_to`` are installed. Torch-free.

``align.training.tracking`` logs to them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from align.errors import UserError


def is_installed(package: str) -> bool:
    """Return whether ``package`` can be imported; a plain folder of that name, as wandb creates, does not count."""
    spec = importlib.util.find_spec(package)
    # A folder of that name in the current directory is found too, as a namespace without an origin.
    return spec is not None and spec.origin is not None


def require_trackers(names: Iterable[str]) -> None:
    """Raise ``UserError`` for the trackers among ``names`` whose package, called as the tracker is, is missing."""
    missing = [name for name in names if not is_installed(name)]
    if missing:
        verb, pronoun = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise UserError(
            f"runtime.report_to: {', '.join(missing)} {verb} not installed. "
            f"`pip install {' '.join(missing)}`, or leave {pronoun} out."
        )
