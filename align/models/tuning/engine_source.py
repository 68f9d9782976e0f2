"""The folder that an engine opens for a policy in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.config.tuning import AdaptersTuning
from align.models.loading import load_tokenizer
from align.models.tuning.apply import apply_tuning, load_for_tuning, save_tuned
from align.models.tuning.stored import is_stored


def engine_source(source: Path, tuning: Any, scratch: Path) -> Path:
    """Return a model folder whose shapes have room for everything that ``tuning`` trains in the policy ``source``.

    That is ``source`` itself where its shapes fit, else a checkpoint of the untrained adapters, written to ``scratch``.
    """
    if not isinstance(tuning, AdaptersTuning) or is_stored(source):
        return source
    if not (scratch / "config.json").is_file():
        model = apply_tuning(
            load_for_tuning(source, tuning), tuning, seed=0
        )  # the seed changes nothing: all start at 0
        save_tuned(model, load_tokenizer(source), scratch)
    return scratch
