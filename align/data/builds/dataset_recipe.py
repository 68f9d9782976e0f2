"""The recipe that a ``data`` stage with ``dataset:`` expands to: a source, or a source per split, and no steps.

Excluded: pinning the commit and the format (``align.stages.data``).
"""

from __future__ import annotations

import contextlib
import glob
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.hub_commits import HUB_NAME
from align.config.recipe.format_options import PAIRED, SEVERAL, Form
from align.config.recipe.recipe import Recipe
from align.config.recipe.source_settings import FilesSource, RecordSource, Source, parse_split
from align.config.stages.inputs import DataConfig
from align.config.user_paths import matching_paths, user_path
from align.config.validation import validate
from align.data.formats.reading import SUFFIXES, suggest_file
from align.data.rows import BadRecord, Dropped, Row
from align.errors import UserError
from align.store.record import RECORD

DEFAULT_SPLIT = "train"
PASSED_ON = tuple(name for name in RecordSource.model_fields if name not in ("name", "format"))
"""Fields of the stage that are the source's, as they are."""


def is_local(dataset: str, base: Path) -> bool:
    """Return True for a dataset of this machine: a file, a folder or a glob. Raises ``UserError`` for no dataset."""
    if matching_paths(dataset, base):
        return True
    looks_like_path = dataset.startswith((".", "/", "~")) or dataset.lower().endswith(SUFFIXES) or "*" in dataset
    if not looks_like_path and HUB_NAME.fullmatch(dataset):
        return False
    path = user_path(dataset, base)
    # A missing file is told from a name of the Hub by its ending, which may be misspelled.
    hint = suggest_file(path) if looks_like_path or path.suffix else ""
    raise UserError(
        f"dataset: '{dataset}' is neither a file, folder or glob below '{base}', nor the name of a Hub dataset like "
        f"'owner/name'.{hint} A name of LLaMA-Factory's dataset_info.json is not known here: write its `file_name` or "
        "`hf_hub_url`. Several datasets are the `sources` of a data recipe."
    )


def sources_of(config: DataConfig, base: Path) -> list[dict[str, Any]]:
    """Return the sources of the stage's dataset as a recipe writes them."""
    assert config.dataset is not None
    fields = {name: getattr(config, name) for name in config.changed(*PASSED_ON)}
    if config.format != "auto":
        fields["format"] = config.format
    if is_local(config.dataset, base):
        _refuse_hub_fields(config)
        return [{"type": "files", "paths": _paths(config.dataset, base), **fields}]
    hub = {"type": "hub", "dataset": config.dataset, "revision": config.revision, **fields}
    if config.name is not None:
        hub["config"] = config.name
    split = config.split or DEFAULT_SPLIT
    if config.test_split is None:
        return [{**hub, "split": split}]
    return [{**hub, "split": split, "part": "train"}, {**hub, "split": config.test_split, "part": "test"}]


def _refuse_hub_fields(config: DataConfig) -> None:
    """Refuse fields that only a dataset of the Hub can have."""
    for name in ("revision", "name", "test_split"):
        if getattr(config, name) is not None:
            raise UserError(f"{name}: '{config.dataset}' is on this machine, and {name} is for datasets of the Hub.")
    if config.split is None:
        return
    parts = parse_split(config.split)
    if [part.name for part in parts] != [DEFAULT_SPLIT] or config.split != DEFAULT_SPLIT:
        raise UserError(
            f"split: '{config.dataset}' is on this machine, and split is for datasets of the Hub. Name the files to "
            "read as dataset; max_rows limits the rows."
        )


def _paths(dataset: str, base: Path) -> list[str]:
    """Return a file or glob as it is, and for a folder a glob of each kind of file in it."""
    folder = user_path(dataset, base)
    if not folder.is_dir():
        return [dataset]
    if (folder / RECORD).is_file():
        raise UserError(f"dataset: '{dataset}' is a finished artifact; use it with `stage: artifact` and `path`.")
    for pattern in ("*", "**/*"):
        names = [file.name.lower() for file in folder.glob(pattern) if file.is_file()]
        # The longest ending of each name: .jsonl.gz, not .gz.
        ends = {next((end for end in SUFFIXES if name.endswith(end)), "") for name in names} - {"", ".md"}
        if ends:
            return [f"{glob.escape(dataset.rstrip('/'))}/{pattern}{end}" for end in sorted(ends)]
    raise UserError(f"dataset: the folder '{dataset}' has no file that can be read; known are {', '.join(SUFFIXES)}.")


def dataset_recipe(config: DataConfig, base: Path) -> Recipe:
    """Return the recipe; ``kind`` and ``format`` of the config must be known (``align.data.builds.dataset_recipe``)."""
    fields: dict[str, Any] = {"kind": config.kind, "sources": sources_of(config, base)}
    if config.kind == "preferences" and config.format in SEVERAL:
        fields["steps"] = [{"type": "pairs"}]
    if config.test_size is not None:
        fields["test_size"] = config.test_size
    return validate(Recipe, fields, f"dataset {config.dataset}")


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
    # Imported late, because a plan of a recipe reads no records.
    from align.data.formats.column_guess import suggest_source
    from align.data.sources import choose_format, read

    try:
        choice = choose_format(source, read(source, base), kind)
    except UserError as error:
        raise UserError(f"{error}{suggest_source(source, base, kind)}") from None
    form = choice.format.form
    return Guess(form, kind or kind_of(form), choice.reason)


def check_named_columns(source: Source, base: Path) -> None:
    """Raise ``UserError`` for a column that a source of local files names and its first records lack."""
    if not isinstance(source, FilesSource) or not source.columns:
        return
    # Imported late, because a plan without named columns reads no records.
    from align.data.formats.detection import DETECTION_RECORDS
    from align.data.sources import read

    # The check is part of reading. It needs one more record than it looks at to notice the end of a short file.
    for _ in itertools.islice(read(source, base), DETECTION_RECORDS + 1):
        pass


def preview_rows(recipe: Recipe, base: Path, count: int) -> list[Row] | None:
    """Return the rows of the first ``count`` records of each source, before any step of the recipe.

    None if a source is no local files. Raises ``UserError`` as building does.
    """
    # Imported late, because most plans need no rows.
    from align.data.formats.converters import convert
    from align.data.sources import choose_format, read

    rows: list[Row] = []
    for source in recipe.sources:
        if not isinstance(source, FilesSource):
            return None
        choice = choose_format(source, read(source, base), recipe.kind)
        for item in itertools.islice(choice.records, count):
            if isinstance(item, BadRecord):
                continue
            with contextlib.suppress(BadRecord):
                converted = convert(item[1], choice.format, item[0], recipe.kind, check=False)
                rows += [{"source": source.label, **row} for row in converted if not isinstance(row, Dropped)]
    return rows
