"""``--set``: one field of a pipeline changed by its path, ``stages.ppo.kl_coef=0.1``. Never imports torch.

A stage of a loop has short paths too: ``stages.dpo.beta`` is ``stages.loop.stages.dpo.beta``, and ``stages.dpo-2.beta``
changes round 2 alone. What a value means is checked when the pipeline is.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from align.config.validation import suggest
from align.config.yaml import parse_yaml
from align.errors import UserError
from align.pipeline.loops import is_loop


def parse_assignment(text: str, example: str = "stages.ppo.kl_coef=0.1") -> tuple[str, Any]:
    """``path=value`` taken apart; the value is YAML. Raises ``UserError`` for anything else, with an ``example``."""
    path, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in path.split(".")):
        raise UserError(f"--set {text}: expected path=value, like {example}.")
    return path.strip(), parse_yaml(value, f"--set {path.strip()}")


def assign(raw: dict[str, Any], path: str, value: Any, known: Collection[str]) -> None:
    """Set ``a.b.c`` in ``raw``, in place; ``known`` are its top-level keys.

    An unknown stage is refused with ``UserError``, a missing block is made.
    """
    parts = path.split(".")
    if parts[0] not in known:
        raise UserError(f"--set {path}: unknown key '{parts[0]}'.{suggest(parts[0], known)}")
    block: Any = raw
    stages = raw.get("stages")
    if parts[0] == "stages" and len(parts) > 2 and isinstance(stages, dict):
        if parts[1] not in stages:
            # Not a stage at the top level, so perhaps the short path of one in a loop.
            parts = _in_loop(stages, parts, path)
        _keep_siblings(stages, parts)
    # Walk down to the block that holds the field, and create blocks that are missing.
    for index, part in enumerate(parts[:-1]):
        block = block.setdefault(_key(block, part), {})
        if not isinstance(block, dict):
            raise UserError(f"--set {path}: '{'.'.join(parts[: index + 1])}' is {block!r}, not a block of keys.")
    block[_key(block, parts[-1])] = value


def _key(block: dict[Any, Any], part: str) -> Any:
    """The key as the YAML has it: numbers of rounds are no texts."""
    return next((key for key in block if str(key) == part), int(part) if part.isdecimal() else part)


def _in_loop(stages: dict[str, Any], parts: list[str], path: str) -> list[str]:
    """The whole path of what is named like a stage and stands in a loop."""
    names = [str(name) for name in stages]
    for loop_name, block in stages.items():
        inner = block.get("stages") if isinstance(block, dict) and is_loop(str(loop_name), block) else None
        if not isinstance(inner, dict):
            continue
        if parts[1] in inner:
            return ["stages", str(loop_name), "stages", *parts[1:]]
        # ``dpo-2``: a change of round 2 alone, which lives in the loop's ``changes``.
        name, _, number = parts[1].rpartition("-")
        if name in inner and number.isdecimal():
            return ["stages", str(loop_name), "changes", number, name, *parts[2:]]
        names += [str(inner_name) for inner_name in inner]
    raise UserError(f"--set {path}: there is no stage '{parts[1]}'.{suggest(parts[1], names)}")


def _keep_siblings(stages: dict[str, Any], parts: list[str]) -> None:
    """A part of a field, changed for one round, leaves the field's other parts as the block has them."""
    if len(parts) < 7 or parts[2] != "changes":
        return
    loop = stages.get(parts[1]) or {}
    # A round's change replaces a field as a unit, so start from a copy of what the block says.
    original = ((loop.get("stages") or {}).get(parts[4]) or {}).get(parts[5])
    if isinstance(original, dict):
        changes = loop.setdefault("changes", {})
        changed = changes.setdefault(_key(changes, parts[3]), {}).setdefault(parts[4], {})
        changed.setdefault(parts[5], copy.deepcopy(original))
