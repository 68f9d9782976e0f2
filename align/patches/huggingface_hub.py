"""Patches of huggingface_hub."""

from __future__ import annotations

import os
import sys


def go_offline() -> None:
    """Make this process and its child processes read only the Hub's cache.

    Sets ``huggingface_hub.constants.HF_HUB_OFFLINE`` if the package is imported already, because it reads the variable
    only then. There is no function for that. The patch was written for huggingface_hub 1.x.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
