"""Find the kind of stage of a YAML block, or the nearest kind if there is no such kind. Never imports torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.config.validation import nearest, suggest
from align.errors import UserError
from align.pipeline.registry import STAGES, Stage, find_stage

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"
LOOP = "loop"
"""Name and kind of a loop, which is written like a stage."""


def stage_of(name: str, block: Mapping[str, Any], above: str) -> Stage:
    """Return the record of the stage that ``block`` sets up: by its ``stage``, else by its name.

    ``above`` is the place of the blocks, ``pipelines/hh.yaml: stages``. Raises ``UserError`` for a name that is not
    allowed and for an unknown kind, with the nearest known one.
    """
    kind = block.get("stage", name)
    place = f"{above}.{name}"
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"{above}: '{name}' is no stage name; use letters, digits, - and _.")
    if not isinstance(kind, str):
        fields = STAGES[name].config_class().model_fields if name in STAGES else ()
        hint = nearest("stage", fields)
        remedy = f" Did you mean '{hint}'?" if hint else f" One of {', '.join(STAGES)}."
        raise UserError(f"{place}.stage: expected the kind of a stage; found {kind!r}.{remedy}")
    if ":" in kind:
        try:
            return find_stage(kind)
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(place) else f"{place}.stage: {text}") from None
    if kind in STAGES:
        return STAGES[kind]
    known = [*STAGES, LOOP]
    if "stage" in block:
        raise UserError(f"{place}.stage: unknown stage '{kind}'.{suggest(kind, known)}")
    # Neither a kind nor a block with ``stage``. It may be a misspelled kind, else a misspelled ``stage``.
    hint = nearest(kind, known)
    if hint:
        raise UserError(
            f"{above}: unknown stage '{name}'. Did you mean '{hint}'? "
            f"(A name of your own needs `stage: {hint}` below it.)"
        )
    slip = nearest("stage", [str(key) for key in block])
    if slip:
        raise UserError(f"{place}: unknown key '{slip}'. Did you mean 'stage'?")
    raise UserError(f"{place}: say which stage this is, with `stage:` one of {', '.join(STAGES)}.")
