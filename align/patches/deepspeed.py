"""Patches of DeepSpeed."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from align.errors import UserError

NAMES = ("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state")


def link_optimizer_states(zero: Any) -> None:
    """Link each parameter of a ZeRO optimizer of stage 1 or 2 to its slice of the flat optimizer state again.

    Sets ``_hp_optimizer_states_linked`` and calls ``_lazy_init_hp_params_optimizer_state``. DeepSpeed links once, at
    its first step, and so before state was created or loaded. The patch was written for DeepSpeed 0.19.
    """
    for name in NAMES:
        if not hasattr(zero, name):
            version = importlib.metadata.version("deepspeed")
            raise UserError(f"deepspeed {version}: its optimizer has no {name}. Install another version.")
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
