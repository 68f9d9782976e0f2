"""Patches of verifiers."""

from __future__ import annotations

from typing import Any

from align.errors import UserError


def set_state(toolset: Any, state: Any) -> None:
    """Give a tool server that runs in this process the state of an episode.

    Sets ``_inert_state``, from which a toolset without a server reads its state. The patch was written for verifiers
    0.4.

    Raises:
        UserError: if the toolset has no such attribute.
    """
    if not hasattr(toolset, "_inert_state"):
        raise UserError(
            f"{type(toolset).__name__} has no _inert_state, which toolsets of verifiers 0.4 have. Install that version."
        )
    toolset._inert_state = state
