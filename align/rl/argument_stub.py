"""``python -m align.rl.argument_stub``: write ``argument_fields.pyi``.

From it type checkers and editors know the fields that ``argument_fields`` makes at import.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from align.config.stages.rl import RolloutFields
from align.rl import argument_fields
from align.rl.argument_fields import DriftArguments
from align.store.atomic_write import write_text_atomically
from align.training.dump_fields import type_text

STUB = Path(argument_fields.__file__).with_suffix(".pyi")
HEADER = '''"""Written by ``python -m align.rl.argument_stub``: change the configs in ``align.config.stages`` instead.

A class leaves out what it shares with ``DriftArguments``, which every trainer's arguments inherit, too.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

'''


def stub_text() -> str:
    """Return the stub of ``argument_fields``: a class for each dataclass, with types and defaults."""
    # Apart, or a search for this file's own imports would find it.
    imported = f"from {RolloutFields.__module__} import {RolloutFields.__name__}\n"
    return "\n".join([HEADER + imported, *map(_class_text, made_dataclasses())])


def made_dataclasses() -> list[type[Any]]:
    """Return the dataclasses of ``argument_fields`` in the order of the file."""
    return [value for value in vars(argument_fields).values() if "stage_config" in getattr(value, "__dict__", {})]


def _class_text(cls: type[Any]) -> str:
    lines = ["@dataclass", f"class {cls.__name__}:", "    stage_config: ClassVar[type[RolloutFields]]"]
    return "\n".join([*lines, *(f"    {line}" for line in _field_lines(cls))]) + "\n"


def _field_lines(cls: type[Any]) -> Iterator[str]:
    shared = {} if cls is DriftArguments else {field.name: field for field in fields(DriftArguments)}
    for field in fields(cls):
        same = shared.get(field.name)
        if same and (same.type, same.default) == (field.type, field.default):
            continue
        # A field that the stage requires has None here, which its type does not allow.
        default = field.default if field.default is not None or "None" in type_text(field.type) else MISSING
        value = "..." if default is MISSING else _quoted(repr(default))
        yield f"{field.name}: {_quoted(type_text(field.type))} = {value}"


def _quoted(text: str) -> str:
    """Return ``text`` with the quotation marks that ruff writes."""
    return text.replace("'", '"')


if __name__ == "__main__":
    write_text_atomically(STUB, stub_text())
