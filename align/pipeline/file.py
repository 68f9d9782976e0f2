"""Turn a pipeline file, or values of a script, into plain values: base files merged, variables and overrides applied.

All of it happens before anything is checked or hashed, so an override can supply a missing field, and keys depend only
on the values. Relative paths then start at the file that names them. Never imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from align.config.base import Config
from align.config.shipped import shipped_files
from align.config.stages.continue_from import CONTINUE, changes_in
from align.config.user_functions import add_module_folder
from align.config.user_paths import LocatedText, locate, settle, unmark
from align.config.validation import suggest
from align.config.yaml import drop_anchor_blocks, load_yaml
from align.errors import UserError, shorten
from align.pipeline.executors import EXECUTOR, in_long_forms
from align.pipeline.loops import is_loop, kind_in
from align.pipeline.overrides import apply_overrides, parse_assignment
from align.pipeline.registry import find_stage

EXTENDS = "extends"
DISCRIMINATORS = ("stage", "method", "type")
"""Keys that decide a block's settings: if a file changes any of them, its base's block is replaced as a whole."""
VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|\$\{")
SECRET = re.compile(r"(?i)(token|secret|passw|api_?key|credential)")

Overrides = Mapping[str, Any] | Iterable[str]
"""``{"stages.ppo.kl_coef": 0.1}``, or texts as ``--set`` accepts them: ``["stages.ppo.kl_coef=0.1"]``."""


def read_pipeline_file(
    path: Path,
    overrides: Overrides,
    known_keys: Collection[str],
    adjust: Callable[[dict[str, Any]], None] = lambda raw: None,
) -> dict[str, Any]:
    """Return the plain values that a pipeline file stands for, with marks of the file (``align.config.user_paths``).

    ``known_keys`` are the top-level keys of a pipeline, by which misspelled overrides are found. ``adjust`` changes the
    values before the overrides do. Raises ``UserError`` for a file that cannot be read, base files that extend each
    other in a circle, a variable that is not set, and an override that names no field.
    """
    # The order is part of the interface: bases, then variables, then overrides, which therefore always win.
    raw: dict[str, Any] = fill_in_variables(_read_with_bases(path, ()), str(path))
    _refuse_other_file(raw, path)
    adjust(raw)
    return _apply(overrides, raw, known_keys)


def _refuse_other_file(raw: Mapping[str, Any], path: Path) -> None:
    """Raise ``UserError`` for a data recipe and for a sweep."""
    if "stages" in raw:
        return
    if "sources" in raw:
        raise UserError(
            f"{path} is a data recipe, not a pipeline. `align data build` builds it, and a stage of kind data reads "
            f"it: `data: {{recipe: {path.name}}}`."
        )
    if "space" in raw:
        raise UserError(f"{path} is a sweep, not a pipeline; `align sweep` runs it.")


def complete_values(
    values: Any, place: str, folder: Path, overrides: Overrides, known_keys: Collection[str]
) -> dict[str, Any]:
    """Return the plain values that a pipeline written as a dictionary stands for, as if a file had held it.

    Its ``extends`` starts at ``folder``. Raises ``UserError`` as :func:`read_pipeline_file` does, and for an object
    that no YAML file can hold.
    """
    if not isinstance(values, Mapping):
        raise UserError(
            f"{place}: expected a dictionary of the keys of a pipeline file; found {shorten(repr(values))}. "
            "Pipeline.load reads a file."
        )
    raw = in_long_forms(drop_anchor_blocks(_plain(values, place)))
    # Relative paths then start at ``folder``, as those in a file start at that file's folder.
    if folder.absolute() != Path.cwd():
        raw = locate(raw, folder / place)
    raw = _merge_with_base(raw, folder, place, ())
    return _apply(overrides, fill_in_variables(raw, place), known_keys)


def _apply(overrides: Overrides, raw: dict[str, Any], known_keys: Collection[str]) -> dict[str, Any]:
    """Apply the overrides to ``raw``, in place, and return it."""
    pairs = overrides.items() if isinstance(overrides, Mapping) else [parse_assignment(text) for text in overrides]
    apply_overrides(raw, pairs, known_keys)
    return raw


def _plain(value: Any, place: str) -> Any:
    """Return a copy in the types that YAML has: tuples as lists, paths as texts, numbers of numpy as Python's."""
    if isinstance(value, Mapping):
        return {_plain(key, place): _plain(item, _below(place, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    # A number of numpy or torch is recognized by its method, so neither has to be imported.
    if type(value).__module__ in ("numpy", "torch") and getattr(value, "shape", None) == ():
        return value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise UserError(
        f"{place}: a pipeline holds dictionaries, lists, texts, numbers, booleans and None; found an object of type "
        f"{type(value).__name__}. Write its name or its value."
    )


def _read_with_bases(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """Return the values of ``path`` merged over its base files; ``readers`` are the files that led here, in order."""
    raw = in_long_forms(locate(load_yaml(path), path))  # first: it refuses paths that no file can have
    resolved = path.resolve()
    # A base file may name modules in its own folder.
    add_module_folder(path)
    if resolved in readers:
        circle = " -> ".join(file.name for file in (*readers[readers.index(resolved) :], resolved))
        raise UserError(f"{readers[-1]}: extends: files extend each other in a circle ({circle}). Take one link out.")
    return _merge_with_base(raw, path.parent, str(path), (*readers, resolved))


def _merge_with_base(raw: dict[str, Any], folder: Path, place: str, readers: tuple[Path, ...]) -> dict[str, Any]:
    """Return ``raw`` on top of the file that it extends, whose path starts at ``folder``; ``place`` is for errors."""
    base = raw.pop(EXTENDS, None)
    if base is None:
        return raw
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{place}: extends: expected the path of a YAML file or the name of a shipped pipeline; found "
            f"{shorten(repr(base))}."
        )
    start = f"the folder of {readers[-1].name}" if readers else "the folder `base`"
    base_path = _find_base(fill_in_variables(base, f"{place}: {EXTENDS}"), folder, f"{place}: {EXTENDS}", start)
    # The base is read with its own bases first, so the file nearest to the user wins.
    return merge(_read_with_bases(base_path, readers), raw)


def _find_base(text: str, folder: Path, place: str, start: str) -> Path:
    """Return the file that ``extends`` names: a path from ``folder``, or the name of a shipped pipeline.

    A file wins. Raises ``UserError`` with the nearest shipped name if there is neither.
    """
    path = folder / Path(text).expanduser()
    if path.is_file():
        return path
    shipped = shipped_files("pipeline")
    if text in shipped:
        return shipped[text]
    hint = f" Names of shipped pipelines are accepted too.{suggest(text, shipped)}" if Path(text).name == text else ""
    raise UserError(f"{place}: there is no file '{path}'; the path starts at {start}.{hint}")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes``: blocks are merged key by key, everything else is replaced.

    A block that changes a key of ``DISCRIMINATORS``, or an executor's name, replaces its base's whole block, whose
    other keys belong to another kind.
    """
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping) and not _is_of_another_kind(key, before, value):
            merged[key] = merge(before, value)
        else:
            merged[key] = value
    return merged


def _is_of_another_kind(key: str, base: Mapping[str, Any], changes: Mapping[str, Any]) -> bool:
    if key == EXECUTOR:
        return "name" in base and "name" in changes and base["name"] != changes["name"]
    # The kind of a stage without ``stage`` is its name, which is the block's key.
    names = {"stage": key}
    return any(word in changes and changes[word] != base.get(word, names.get(word)) for word in DISCRIMINATORS)


def fill_in_variables(value: Any, place: str) -> Any:
    """Return a copy with ``${NAME}`` and ``${NAME:-default}`` replaced in every text; ``$${`` stands for ``${``.

    Raises ``UserError``, which begins with the place of the text, for a variable that is not set, a reference that is
    not closed or has no plain name, and a name that looks like a secret's: what is filled in is written into records.
    """
    if isinstance(value, dict):
        return {key: fill_in_variables(item, _below(place, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [fill_in_variables(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    text = VARIABLE.sub(lambda match: _substitute(match, place), value)
    # The mark stays: a path with a variable still starts at its file.
    return LocatedText(text, value.file) if isinstance(value, LocatedText) else text


def _below(place: str, key: Any) -> str:
    """Return the place of a key: ``file.yaml: stages`` at the top, ``file.yaml: stages.sft`` below it."""
    return f"{place}.{key}" if ": " in place else f"{place}: {key}"


def _substitute(match: re.Match[str], place: str) -> str:
    """Return the replacement of a match, in a text at ``place``."""
    name = match["name"]
    if match[0] == "$${":
        return "${"
    if name is None:
        raise UserError(
            f"{place}: '${{' begins a variable that has no plain name; write ${{NAME}}, or $${{ for the text."
        )
    # Every substituted value is written to records and reports, which must not contain a secret.
    if SECRET.search(name):
        raise UserError(
            f"{place}: ${{{name}}} looks like a secret, and values of a pipeline are written into records. Remove it: "
            "libraries read such variables by themselves, and endpoints accept the variable's name (`key_variable`)."
        )
    value = os.environ.get(name, match["default"])
    if value is None:
        raise UserError(
            f"{place}: the environment variable {name} is not set; set it, or give a default: ${{{name}:-VALUE}}."
        )
    return value


Blocks = Mapping[str, Any]


def settle_pipeline(raw: Mapping[str, Any], base: Path, where: str) -> dict[str, Any]:
    """Return a pipeline's plain values with its stages' paths relative to ``base``.

    Blocks that are refused later are left as they are. Raises ``UserError`` as ``settle`` does.
    """
    settled = unmark(raw)
    if isinstance(raw.get("stages"), Mapping):
        settled["stages"] = _settle_stages(raw["stages"], base, f"{where}: stages")
    return dict(settled)


def _settle_stages(blocks: Blocks, base: Path, place: str) -> dict[str, Any]:
    settled: dict[str, Any] = {}
    for name, block in blocks.items():
        here = f"{place}.{name}"
        if not isinstance(block, Mapping):
            settled[name] = unmark(block)
        elif is_loop(str(name), block):
            settled[name] = _settle_loop(block, base, here)
        else:
            settled[name] = _settle_stage(block, _config_class(str(name), blocks), base, here)
    return settled


def _settle_loop(loop: Blocks, base: Path, place: str) -> dict[str, Any]:
    settled: dict[str, Any] = unmark(loop)
    stages = loop.get("stages")
    if not isinstance(stages, Mapping):
        return settled
    settled["stages"] = _settle_stages(stages, base, f"{place}.stages")
    changes = loop.get("changes")
    for number, blocks in changes.items() if isinstance(changes, Mapping) else ():
        for name, block in blocks.items() if isinstance(blocks, Mapping) else ():
            where = f"{place}.changes.{number}.{name}"
            settled["changes"][number][name] = _settle_stage(block, _config_class(str(name), stages), base, where)
    return settled


def _settle_stage(block: Any, config_class: type[Config] | None, base: Path, place: str) -> Any:
    if config_class is None:
        return unmark(block)
    settled = settle(config_class, block, base, place)
    change = changes_in(block) if isinstance(block, Mapping) else {}
    if change:
        # The changed settings are fields of the stage, and may name files as well.
        where = f"{place}.{CONTINUE}.change"
        settled[CONTINUE] = {**settled[CONTINUE], "change": settle(config_class, change, base, where)}
    return settled


def _config_class(name: str, blocks: Blocks) -> type[Config] | None:
    """Return the config class of a stage; None for a kind that there is not, which is refused later."""
    try:
        config: type[Config] = find_stage(kind_in(name, blocks)).config_class()
        return config
    except (KeyError, UserError):
        return None
