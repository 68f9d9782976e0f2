"""Optional packages: the extra of align that installs each, and the error where it is missing. Never imports torch."""

from __future__ import annotations

import importlib.util

from align.errors import UserError


def require_extra(module: str, extra: str, user: str) -> None:
    """Raise ``UserError`` where ``module`` is not installed; ``user`` is what needs it, and begins the message.

    Nothing is imported, so that a plan can ask for what a stage will need.
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
