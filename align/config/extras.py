"""Optional packages: the extra of align that installs each, and the error if it is missing. Never imports torch."""

from __future__ import annotations

import importlib.util

from align.errors import UserError


def require_extra(module: str, extra: str, user: str) -> None:
    """Raise ``UserError`` if ``module`` is not installed.

    The message begins with ``user``, the feature that needs the module. The module is not imported, so a plan can check
    what a stage will need.
    """
    try:
        is_there = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        is_there = False
    if not is_there:
        raise missing_extra(module, extra, user)


def missing_extra(module: str, extra: str, user: str) -> UserError:
    """Return the error for a ``module`` that is not installed."""
    remedy = f"pip install 'align-pipeline[{extra}]'"
    return UserError(f"{user} needs the package {module}, which is not installed: {remedy}.")
