"""Check that the user's code is still the code that a stage's key was computed from. Never imports torch.

Minutes may pass between the command that computes the key and the process that imports the code, on a cluster hours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from align.config.base import Config
from align.errors import UserError
from align.pipeline.registry import Stage

CODE_DIGEST = "sha256:"
"""Part of every identity of a function or an environment that has code of the user's."""


def require_planned_code(stage: Stage, config: Config, planned: Mapping[str, str], name: str) -> None:
    """Raise ``UserError`` if an environment or a function that scores has changed since the stage was planned.

    ``planned`` are the identities in the stage's key, ``name`` is the stage's. Only stages that sample are checked.
    """
    names = [place for place, identity in planned.items() if CODE_DIGEST in identity]
    if not stage.samples or not names:
        return
    current = stage.identities(config, Path.cwd())
    changed = [place for place in names if current.get(place) != planned[place]]
    if changed:
        raise UserError(
            f"{name}.{changed[0]}: its code has changed since this run was started, so the result would be stored "
            "under the key of the old code. Nothing was run, and all episodes on disk are kept. Run the command again "
            "to use the new code, or restore the old code to continue."
        )
