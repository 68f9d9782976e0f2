"""``--set``: one field of a pipeline changed by its path, ``stages.ppo.kl_coef=0.1``. Never imports torch.

``stages.evaluate.policies[0]=sft`` changes an item of a list, ``stages.evaluate.policies+=sft2`` adds one, and
``stages.sft2.stage=sft`` or ``stages.sft2={stage: sft, …}`` adds a stage. A stage of a loop has short paths too:
``stages.dpo.beta`` is ``stages.loop.stages.dpo.beta``, and ``stages.dpo-2.beta`` changes only round 2. Values are
checked with the pipeline.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from align.config.validation import suggest
from align.config.yaml import parse_yaml
from align.errors import UserError, shorten
from align.pipeline.loops import is_loop

APPEND = "[+]"
"""Last part of a path whose value is added to a list; users write ``+=``."""
PART = re.compile(r"(?P<name>[^\[\]]+)(?P<indices>(\[\d+\])*)")


def parse_assignment(text: str, example: str = "stages.ppo.kl_coef=0.1") -> tuple[str, Any]:
    """Split ``path=value``; the value is YAML, and the path of ``path+=value`` ends with ``+``.

    Raises ``UserError`` for anything else, with an ``example``.
    """
    path, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in path.removesuffix("+").split(".")):
        raise UserError(f"--set {text}: expected path=value, like {example}.")
    return path.strip(), parse_yaml(value, f"--set {path.strip()}")


def apply_overrides(raw: dict[str, Any], overrides: Iterable[tuple[str, Any]], top_keys: Collection[str]) -> None:
    """Apply all overrides to a pipeline's values, in place; ``top_keys`` are the keys that it may have.

    An added stage is placed right below the last stage that it reads, so every stage further down can read it. Raises
    ``UserError`` for a path that does not exist.
    """
    names_before = {place: list(blocks) for place, blocks in _blocks_of_stages(raw)}
    for path, value in overrides:
        assign(raw, path, copy.deepcopy(value), top_keys)
    for place, blocks in _blocks_of_stages(raw):
        _place_added(blocks, [name for name in blocks if name not in names_before.get(place, blocks)])


def _blocks_of_stages(raw: dict[str, Any]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield every block that holds stages, with its place: the pipeline's block and its loops' blocks."""
    stages = raw.get("stages")
    if not isinstance(stages, dict):
        return
    yield "stages", stages
    for name, block in stages.items():
        if isinstance(block, dict) and is_loop(str(name), block) and isinstance(block.get("stages"), dict):
            yield f"stages.{name}.stages", block["stages"]


def _place_added(blocks: dict[Any, Any], added: list[Any]) -> None:
    """Move the stages ``added`` up, in place, each right below the last stage that it reads."""
    waiting = {name: blocks.pop(name) for name in added}
    while waiting:
        # Added stages may depend on each other. A stage without a waiting input is next (any stage, if they form a
        # circle).
        ready = [name for name, block in waiting.items() if not _texts(block) & (set(waiting) - {name})]
        name = (ready or list(waiting))[0]
        block = waiting.pop(name)
        items = list(blocks.items())
        read = _texts(block)
        indices = [index for index, item in enumerate(items) if _offers(*item) & read]
        items.insert(indices[-1] + 1 if indices else 0, (name, block))
        blocks.clear()
        blocks.update(items)


def _texts(value: Any) -> set[str]:
    """Return all texts of a stage's block except its kind; names of rounds (``dpo-2``, ``dpo-*``) without the round."""
    if isinstance(value, str):
        return {value, value.rpartition("-")[0]}
    if isinstance(value, dict):
        return {text for key, item in value.items() if key != "stage" for text in _texts(item)}
    return {text for item in value for text in _texts(item)} if isinstance(value, list) else set()


def _offers(name: Any, block: Any) -> set[str]:
    """Return the names by which other stages read this block: its name, and the names of a loop's stages."""
    if not isinstance(block, dict) or not is_loop(str(name), block) or not isinstance(block.get("stages"), dict):
        return {str(name)}
    return {str(name), *map(str, block["stages"])}


def assign(raw: dict[str, Any], path: str, value: Any, top_keys: Collection[str]) -> None:
    """Assign to ``a.b.c`` or ``a.b[0].c`` in ``raw``, in place; add to the list at ``a.b+``.

    ``top_keys`` are the top-level keys. An unknown stage is refused with ``UserError``, and a missing block is made.
    """
    parts = _split(path)
    stages = raw.get("stages")
    if parts[0] not in top_keys:
        is_stage = isinstance(stages, dict) and parts[0] in map(str, stages)
        remedy = f" A field of that stage is stages.{path}." if is_stage else suggest(parts[0], top_keys)
        raise UserError(f"--set {path}: unknown key '{parts[0]}'.{remedy}")
    if parts[0] == "stages" and len(parts) > 2 and isinstance(stages, dict):
        if parts[1] not in stages:
            # The name is not a stage at the top level. It may be the short path of a loop's stage, or a new stage.
            parts = _in_loop(stages, parts, path)
        _keep_siblings(stages, parts)
    appends = parts[-1] == APPEND
    *above, last = parts[:-1] if appends else parts
    # Walk down to the block or list that holds the field, and create blocks that are missing.
    holder: Any = raw
    for index, part in enumerate(above):
        holder = _enter(holder, above[:index], part, path)
    place = _joined([*above, last])
    if appends:
        _append(holder, _slot(holder, above, last, path), value, place)
    else:
        holder[_slot(holder, above, last, path)] = value


def _split(path: str) -> list[str]:
    """Return the parts of a path; the index of a list is a separate part, ``[0]``."""
    parts: list[str] = []
    for text in path.removesuffix("+").strip().split("."):
        match = PART.fullmatch(text)
        if match is None:
            raise UserError(f"--set {path}: '{text}' is no key; an item of a list is written NAME[0], counted from 0.")
        parts += [match["name"], *re.findall(r"\[\d+\]", match["indices"])]
    return [*parts, APPEND] if path.endswith("+") else parts


def _joined(parts: list[str]) -> str:
    return ".".join(parts).replace(".[", "[")


def _enter(holder: Any, above: list[str], part: str, path: str) -> Any:
    """Return the value at ``part`` of ``holder``, the value at ``above``; a missing block is made."""
    slot = _slot(holder, above, part, path)
    return holder.setdefault(slot, {}) if isinstance(holder, dict) else holder[slot]


def _slot(holder: Any, above: list[str], part: str, path: str) -> Any:
    """Return the key or index by which ``holder``, the value at ``above``, has ``part``; ``UserError`` if it cannot."""
    place = _joined(above)
    is_index = part.startswith("[")
    if isinstance(holder, list):
        if not is_index:
            raise UserError(f"--set {path}: '{place}' is a list; write {place}[0] for its first item.")
        index = int(part[1:-1])
        if index >= len(holder):
            last = f"the last is [{len(holder) - 1}]" if holder else "it is empty"
            raise UserError(f"--set {path}: '{place}' has no item {part}; {last}. {place}+=VALUE adds one.")
        return index
    if not isinstance(holder, dict):
        raise UserError(f"--set {path}: '{place}' is {shorten(repr(holder))}, not a block of keys.")
    if is_index:
        content = "a block of keys" if holder else "not set in the file"
        raise UserError(f"--set {path}: '{place}' is {content}, not a list; an index such as {part} needs one.")
    return _key(holder, part)


def _append(holder: Any, slot: Any, value: Any, place: str) -> None:
    """Add ``value``, or each of its items if it is a list, to the list in ``slot``; a text becomes a list first."""
    before = holder.get(slot) if isinstance(holder, dict) else holder[slot]
    if isinstance(before, str):
        before = [before]  # fields such as `reward` accept a name or a list of names
    if not isinstance(before, list):
        content = "is not set in the file" if before is None else "is no list"
        remedy = "Write stages.NAME.stage=KIND to add a stage" if place == "stages" else f"Write {place}=[…]"
        raise UserError(f"--set {place}+=…: '{place}' {content}. {remedy}.")
    holder[slot] = before + (value if isinstance(value, list) else [value])


def _key(block: dict[Any, Any], part: str) -> Any:
    """The key as the YAML has it: numbers of rounds are no texts."""
    return next((key for key in block if str(key) == part), int(part) if part.isdecimal() else part)


def _in_loop(stages: dict[str, Any], parts: list[str], path: str) -> list[str]:
    """Return the complete path for the short path of a loop's stage, or the path of a new stage if its kind is set."""
    names = [str(name) for name in stages]
    for loop_name, block in stages.items():
        inner = block.get("stages") if isinstance(block, dict) and is_loop(str(loop_name), block) else None
        if not isinstance(inner, dict):
            continue
        if parts[1] in inner:
            return ["stages", str(loop_name), "stages", *parts[1:]]
        # ``dpo-2`` changes only round 2, in the loop's ``changes``.
        name, _, number = parts[1].rpartition("-")
        if name in inner and number.isdecimal():
            return ["stages", str(loop_name), "changes", number, name, *parts[2:]]
        names += [str(inner_name) for inner_name in inner]
    if parts[2:] == ["stage"]:
        return parts
    raise UserError(
        f"--set {path}: there is no stage '{parts[1]}'.{suggest(parts[1], names)} A new one begins with "
        f"`--set stages.{parts[1]}.stage=KIND`."
    )


def _keep_siblings(stages: dict[str, Any], parts: list[str]) -> None:
    """A part of a field, changed for one round, leaves the field's other parts as the block has them."""
    # ``stages.LOOP.changes.ROUND.STAGE.FIELD``, and at least one part below the field.
    if len(parts) < 7 or parts[2] != "changes":
        return
    loop = stages.get(parts[1]) or {}
    # A round's change replaces a field as a unit, so start from a copy of what the block says.
    original = ((loop.get("stages") or {}).get(parts[4]) or {}).get(parts[5])
    if isinstance(original, dict | list) or (isinstance(original, str) and parts[-1] == APPEND):
        changes = loop.setdefault("changes", {})
        changed = changes.setdefault(_key(changes, parts[3]), {}).setdefault(parts[4], {})
        changed.setdefault(parts[5], copy.deepcopy(original))
