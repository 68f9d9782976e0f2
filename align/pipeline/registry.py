"""The kinds of stages that YAML blocks name. Torch-free."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config.user_functions import search_module_folders
from align.config.validation import nearest, suggest
from align.errors import UserError, shorten, with_article
from align.registry import NoModule, Stage, failure_note, load, registered
from align.store.record import NAME

STAGES = registered(Stage)
"""Every kind of stage, in the order of a usual pipeline; those of extensions follow."""


def load_object(path: str) -> Any:
    """Import ``package.module:name``, also from the current folder and from YAML files' folders.

    Raises ``UserError`` when there is no such module or name.
    """
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), name]):
        raise UserError(f"'{shorten(path)}' is not an import path; write package.module:name.")
    search_module_folders()
    try:
        return load(path)
    except NoModule:
        if str(Path.cwd()) in sys.path:
            raise
        # Append the folder, because a file of the user's must not hide an installed module.
        sys.path.append(str(Path.cwd()))
        return load(path)


def find_stage(kind: str) -> Stage:
    """Return the stage of a kind, or a user's stage by the import path of its ``Stage`` (``module:NAME``).

    Raises ``KeyError`` for a name that is neither and ``UserError`` for an import path that does not load.
    """
    if ":" not in kind:
        return STAGES[kind]
    stage = load_object(kind)
    if not isinstance(stage, Stage):
        raise UserError(f"'{kind}' is {with_article(type(stage).__name__)}, not an align.registry.Stage.")
    if not re.fullmatch(NAME, stage.kind):
        raise UserError(
            f"'{kind}': its kind {stage.kind!r} cannot name a folder of the store. Write it with letters, digits and "
            "'_', '.', ':' or '-', beginning with a letter, a digit or '_'."
        )
    return stage


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
        raise UserError(f"{above}: '{name}' is not a valid stage name; use letters, digits, - and _.")
    if not isinstance(kind, str):
        raise UserError(f"{place}.stage: expected the kind of a stage; found {kind!r}. One of {', '.join(STAGES)}.")
    if ":" in kind:
        try:
            return find_stage(kind)
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(place) else f"{place}.stage: {text}") from None
    if kind in STAGES:
        return STAGES[kind]
    kinds = [*STAGES, LOOP]
    if "stage" in block:
        raise UserError(f"{place}.stage: unknown stage '{kind}'.{suggest(kind, kinds)}{failure_note()}")
    # Neither a kind nor a block with ``stage``. It may be a misspelled kind, else a misspelled ``stage``.
    hint = nearest(kind, kinds)
    if hint:
        raise UserError(
            f"{above}: unknown stage '{name}'. Did you mean '{hint}'? "
            f"(A name of your own needs `stage: {hint}` below it.){failure_note()}"
        )
    misspelled = nearest("stage", [str(key) for key in block])
    if misspelled:
        raise UserError(f"{place}: unknown key '{misspelled}'. Did you mean 'stage'?")
    raise UserError(f"{place}: say which stage this is, with `stage:` one of {', '.join(STAGES)}.{failure_note()}")
