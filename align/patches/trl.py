"""Patches of trl."""

from __future__ import annotations

from typing import Any

from align.patches.signatures import private_name


def replace_fused_head(head: Any) -> None:
    """Have trl's fused head score labeled positions only, with an autograd function of align.

    Replaces ``_use_triton`` and ``_ChunkedLogProbFunction`` of ``trl.trainer.utils``. On devices without Triton, trl
    scores every position, also prompts and padding; with 49,000 tokens that is most of a small model's work. It calls
    the first name for that choice only. There is no option for either. The patch was written for trl 1.16.

    Args:
        head: Replaces trl's autograd function, which is called by its ``apply``.
    """
    module = "trl.trainer.utils"
    private_name("trl", f"{module}:_use_triton", ["device"])
    private_name("trl", f"{module}:_ChunkedLogProbFunction.apply")
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True  # type: ignore[attr-defined]
    trl.trainer.utils._ChunkedLogProbFunction = head  # type: ignore[attr-defined]
