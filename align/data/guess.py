"""Guess a source's format, and the kind of dataset it gives, from its first records.

Left out: detecting the format itself (``formats/detection.py``), and columns of other names.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from align.config.recipe.format_options import PAIRED, SEVERAL, Form
from align.config.recipe.source_settings import FilesSource, Source

KINDS_OF_FORMATS = {
    **dict.fromkeys((*PAIRED, *SEVERAL), "preferences"),
    "unpaired": "unpaired",
    "stepwise": "unpaired",
    "prompt": "prompts",
    "text": "texts",
}
"""Kind of dataset that a format usually is for; all others have one answer to a prompt."""


@dataclass(frozen=True)
class Guess:
    """A source's format, the kind of dataset, and the reason in words."""

    format: Form
    kind: str
    reason: str


def kind_of(form: str) -> str:
    """Return the kind of dataset that a format is for."""
    return KINDS_OF_FORMATS.get(form, "instructions")


def guess(source: Source, base: Path, kind: str | None = None) -> Guess:
    """Read the first records of ``source``, relative to ``base``, and guess their format, of those that give ``kind``.

    Raises ``UserError`` for a source that cannot be read, and for records that fit no format or several.
    """
    # Late: a plan of a recipe guesses nothing, and reads no records.
    from align.data.sources import choose_format, read

    choice = choose_format(source, read(source, base), kind)
    form = choice.format.form
    return Guess(form, kind or kind_of(form), choice.reason)


def check_named_columns(source: Source, base: Path) -> None:
    """Raise ``UserError`` for a column that a source of local files names and its first records lack."""
    if not isinstance(source, FilesSource) or not source.columns:
        return
    # Late: a plan without named columns reads no records.
    from align.data.formats.detection import DETECTION_RECORDS
    from align.data.sources import read

    # The check is part of reading. It needs one more record than it looks at to notice the end of a short file.
    for _ in itertools.islice(read(source, base), DETECTION_RECORDS + 1):
        pass
