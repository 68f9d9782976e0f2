"""Which experiment trackers ``runtime.report_to`` may name, and whether they are installed. Torch-free.

Feeding them is ``align.training.tracking``'s.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from align.errors import UserError


def is_installed(package: str) -> bool:
    """Whether ``package`` can be imported; a mere folder of that name (wandb makes one where it runs) is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def require_trackers(names: Iterable[str]) -> None:
    """Raise ``UserError`` for the trackers among ``names`` whose package, called as the tracker is, is missing."""
    missing = [name for name in names if not is_installed(name)]
    if missing:
        raise UserError(
            f"runtime.report_to: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. "
            f"`pip install {' '.join(missing)}`, or leave {'it' if len(missing) == 1 else 'them'} out."
        )
