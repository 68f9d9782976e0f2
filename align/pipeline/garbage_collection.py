"""Python's garbage collections in a process that imports torch, transformers and trl and then works. Torch-free.

Such a process imports some 400,000 objects that live until its end. While they come in, Python walks all that are there
time and again, and later each full collection walks them once more: a fifth of the CPU time of a short stage.
"""

from __future__ import annotations

import atexit
import gc

THRESHOLDS = gc.get_threshold()
IMPORT_THRESHOLDS = (50_000, 20, 100)
"""Collections are rare rather than off, because a stage that loads no model also needs them."""


def relax_collections() -> None:
    """Collect garbage rarely from now on; for the start of a process, before it imports its libraries."""
    gc.set_threshold(*IMPORT_THRESHOLDS)


def resume_collections() -> None:
    """Collect garbage as usual again, but never walk again what has been imported.

    Nothing happens in a process that has not relaxed them, or the second time. Call it before the first model is
    loaded: what is frozen and becomes garbage later is never freed.
    """
    if gc.get_threshold() != IMPORT_THRESHOLDS:
        return
    gc.freeze()
    # Libraries that find frozen objects of theirs at the end, as triton does, report them as leaks.
    atexit.register(gc.unfreeze)
    gc.set_threshold(*THRESHOLDS)
