"""Safe reading and writing of YAML, with line and column in errors; duplicate keys are refused. Never imports torch.

Plain scalars follow YAML 1.2: ``true`` and ``false`` are the only booleans, and numbers are decimal. What YAML 1.1
reads as an octal number (010), a time in base 60 (1:30:00), a date or a boolean (no) is text here. ``validation.py``
checks the keys.

Top-level keys that begin with ``x-``, and ``defaults``, hold blocks for anchors. They are removed after YAML has merged
them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from align.errors import UserError, shorten

MAX_VALUES = 1_000_000
"""Most values of a file after its aliases are expanded; a few lines of nested aliases could mean billions."""


ANCHOR_BLOCK = "defaults"
ANCHOR_PREFIX = "x-"
"""The key, and the beginning of further keys, that hold blocks for anchors at the top of a file (as in compose)."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, of which YAML readers otherwise silently drop one.

    A key from a merge (``<<: *base``) is no duplicate: the mapping's own key overrides it.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys into the mapping, after checking its own keys for duplicates."""
        keys: set[Any] = set()
        # An alias leads to its node several times; from the second on, merged keys would look like duplicates.
        for key_node, _ in [] if getattr(node, "flattened", False) else node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            keys.add(key)
        node.flattened = True  # type: ignore[attr-defined]
        super().flatten_mapping(node)


SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    # YAML 1.1 reads 5e-4 as text: it wants a dot and a sign. Everyone who writes learning rates means the number.
    (
        "float",
        r"[-+]?((0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?(0|[1-9][0-9_]*)[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
"""Tag, pattern and first characters of plain scalars that are not text."""
REPLACED = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp", "value"))

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _spelling, _first in SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_spelling})$"), list(_first))


def load_yaml(path: Path) -> dict[str, Any]:
    """Load a YAML mapping, without the blocks that only hold anchors.

    Raises ``UserError`` for a file that is missing (similar names are suggested), is not UTF-8, does not parse (line
    and column), repeats a key, is not a mapping, or has unused ``defaults``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file.{_similar_files(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a YAML file in it.{_similar_files(path / 'x.yaml')}") from None
    except PermissionError:
        raise UserError(f"{path}: not readable; check its permissions.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{shorten(str(path))}' cannot be read: {reason}.") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        content = "is empty" if data is None else f"holds {type(data).__name__}"
        raise UserError(f"{path}: expected a mapping of keys to values, but the file {content}.")
    if ANCHOR_BLOCK in data and not _is_referred_to(text, ANCHOR_BLOCK):
        raise UserError(
            f"{path}: {ANCHOR_BLOCK}: nothing refers to it, so it sets nothing. Give a block in it an anchor "
            "(`lora: &lora {rank: 16}`) and merge it where it counts (`<<: *lora`). `extends:` names another file."
        )
    return drop_anchor_blocks(data)


def drop_anchor_blocks(values: dict[Any, Any]) -> dict[Any, Any]:
    """Return the values of a file without the top-level blocks that only hold anchors."""
    return {key: value for key, value in values.items() if not _is_anchor_block(key)}


def _is_anchor_block(key: Any) -> bool:
    return isinstance(key, str) and (key == ANCHOR_BLOCK or key.startswith(ANCHOR_PREFIX))


def _is_referred_to(text: str, name: str) -> bool:
    """Return whether an alias outside the top-level block ``name`` leads to something in it."""
    # In the graph of nodes an alias is its target itself: the block shares a node with the rest of the file.
    top = yaml.compose(text, Loader=_Loader)
    assert isinstance(top, yaml.MappingNode)
    inside: set[int] = set()
    outside: set[int] = set()
    for key, value in top.value:
        _collect_nodes(value, inside if key.value == name else outside)
    return bool(inside & outside)


def _collect_nodes(node: yaml.Node, collected: set[int]) -> None:
    """Add the identity of ``node``, and of every node below it, to ``collected``."""
    if id(node) in collected:
        return
    collected.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _collect_nodes(key, collected)
            _collect_nodes(value, collected)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _collect_nodes(item, collected)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text safely; ``UserError`` names line and column."""
    try:
        return _expand(yaml.load(text, Loader=_Loader), [0])  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "an unknown place"
        raise UserError(f"{where}: invalid YAML at {place}: {error.problem or error}.") from None
    except RecursionError:
        raise UserError(
            f"{where}: invalid YAML: an alias (*name) is inside what it names, or nests too deep."
        ) from None
    except (yaml.YAMLError, ValueError, OverflowError, KeyError, AttributeError, TypeError) as error:
        # The last exceptions come from tags that do not fit their text: `!!bool x`.
        raise UserError(f"{where}: invalid YAML: {shorten(str(error))}.") from None


def _expand(value: Any, count: list[int]) -> Any:
    """Return a copy without shared objects: overriding a field of one stage must not change another stage.

    ``count`` holds the number of values so far.
    """
    # A shared counter: nested aliases multiply, and the limit is on what the whole file unfolds to.
    count[0] += 1
    if count[0] > MAX_VALUES:
        raise ValueError(f"its aliases (*name) unfold to more than {MAX_VALUES:,} values, or into themselves")
    if isinstance(value, dict):
        return {key: _expand(item, count) for key, item in value.items()}
    return [_expand(item, count) for item in value] if isinstance(value, list) else value


def _similar_files(path: Path) -> str:
    folder = path.parent
    names = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f" Did you mean {folder / close[0]}?"
    if names:
        return f" {folder} has: {', '.join(names)}."
    if folder.is_dir():
        return ""
    start = "" if path.is_absolute() else "; relative paths start at the current folder"
    return f" Nor is there a folder {folder}{start}."


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text that ``parse_yaml`` would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values in full."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    try:
        quoted = yaml.load(text, Loader=_Loader) != text  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError:
        quoted = True
    style = None
    if "\n" in text.strip():
        style = "|"
    elif quoted:
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """Return plain values as YAML text that ``parse_yaml`` reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
