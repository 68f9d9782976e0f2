"""Settings of a recipe's sources: where the records are, their format and their license.

``align.data.sources`` reads the records, ``align.data.formats`` converts them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config
from align.config.recipe.format_options import Format, FormatOptions
from align.config.recipe.record_mapping import RecordMapping
from align.config.user_functions import check_arguments
from align.config.user_paths import UserPath
from align.config.validation import suggest
from align.errors import UserError

Part = Literal["split", "train", "test"]

MAPPED_FORMS = {"better": ("preferences",), "grouped": ("scored", "ranked")}
"""Formats of the records that a mapping makes."""

EMBEDDED_MAX_ROWS = 8_000
"""Largest size of the embedded dataset: beyond it the smaller families run out of different prompts."""
_NAMES = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
EMBEDDED_FAMILIES: tuple[str, ...] = tuple(_NAMES["embedded families"])
"""Families of the embedded dataset (``align.data.families.embedded``), in the order in which they take turns."""


KNOWN_DATASETS: dict[str, dict[str, str]] = _NAMES["known datasets"]
"""Name → owner and name, configuration and split on the Hub."""


class SourceConfig(Config):
    """Fields that every source has."""

    name: str | None = Field(None, min_length=1, max_length=200)
    """Name in the ledger, on the card and in each row's ``source``; by default the place it comes from."""
    license: str | None = Field(None, min_length=1)
    """SPDX identifier (Apache-2.0) or free text. The card states it, since a mixture inherits the strictest."""
    part: Part = "split"
    """Split of the rows: divided by ``test_size``, or all rows in ``train`` or in ``test``."""

    @property
    def label(self) -> str:
        """``name``, or the origin of the records."""
        return self.name or self._origin()

    def _origin(self) -> str:
        raise NotImplementedError


class RecordSource(RecordMapping, SourceConfig):
    """A source whose records are in a known format, or are mapped to a known format."""

    format: Format = "auto"
    """Format of the records; ``auto`` detects it from the first hundred records and reports its choice with the
    reason."""
    options: FormatOptions = FormatOptions()
    """Choices that the format leaves open."""

    def _may_read_files(self) -> bool:
        return bool(getattr(self, "paths", None) or getattr(self, "files", None))

    @model_validator(mode="after")
    def _check_mapping(self) -> Self:
        for name in ("better", "grouped"):
            forms = MAPPED_FORMS[name]
            if getattr(self, name) is not None and self.format not in ("auto", *forms):
                named_forms = " or ".join(forms)
                raise ValueError(f"{name} makes records of format {named_forms}, and format is {self.format}; drop one")
        for name in ("header", "records", "delimiter", "encoding"):
            if getattr(self, name) is not None and not self._may_read_files():
                raise ValueError(f"{name} is about files, and this source reads none; remove it")
        if self.format == "rows" and (self.columns or self.system or self.keep):
            raise ValueError(
                "format: rows reads align's own rows with all their columns, so columns, system and keep mean nothing; "
                "drop them"
            )
        return self


class EmbeddedSource(SourceConfig):
    """The project's own generator of checkable instructions."""

    type: Literal["embedded"]
    size: int = Field(4000, ge=1, le=EMBEDDED_MAX_ROWS)
    """Rows to generate, before the split."""
    families: list[str] | None = Field(None, min_length=1)
    """Families of instructions, by name; all of them by default."""
    format: ClassVar[Literal["rows"]] = "rows"
    options: ClassVar[FormatOptions] = FormatOptions()

    def _origin(self) -> str:
        return "embedded"

    @model_validator(mode="after")
    def _check_families(self) -> Self:
        for name in self.families or []:
            if name not in EMBEDDED_FAMILIES:
                raise ValueError(f"there is no family '{name}'.{suggest(name, EMBEDDED_FAMILIES)}")
        return self


class GymTask(Config):
    """A task of reasoning-gym with its configuration."""

    name: str
    """Name in reasoning-gym: ``chain_sum``."""
    arguments: dict[str, Any] = Field({})
    """Fields of its configuration: ``{min_terms: 2, max_terms: 3}``."""


class GymSource(SourceConfig):
    """Tasks of the package reasoning-gym, with a verifier for ``score: reasoning_gym`` (extra ``gym``)."""

    type: Literal["reasoning_gym"]
    tasks: list[str | GymTask] = Field(min_length=1)
    """Tasks that alternate: names, or names with ``arguments``."""
    count: int = Field(1000, ge=1, le=10_000_000)
    """Rows to generate, before the split."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Another seed makes other questions."""
    format: ClassVar[Literal["rows"]] = "rows"
    options: ClassVar[FormatOptions] = FormatOptions()

    @property
    def named_tasks(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and arguments of the tasks."""
        return [(task, {}) if isinstance(task, str) else (task.name, task.arguments) for task in self.tasks]

    def _origin(self) -> str:
        return f"reasoning_gym {', '.join(name for name, _ in self.named_tasks)}"

    @model_validator(mode="after")
    def _check_sets_no_seed(self) -> Self:
        for name, arguments in self.named_tasks:
            fields = sorted({"seed", "size"} & set(arguments))
            if fields:
                raise ValueError(f"the task '{name}' sets {fields[0]}, which is a field of the source: seed, or count")
        return self


class FilesSource(RecordSource):
    """Local files."""

    type: Literal["files"]
    paths: list[UserPath] = Field(min_length=1)
    """Paths or globs of .json, .jsonl, .csv, .tsv or .parquet files (all but Parquet may be compressed: .gz, .bz2, .xz,
    .zst), and for kind ``texts`` of .txt and .md files, one document each; relative to the recipe's folder."""

    identified: ClassVar[frozenset[str]] = frozenset({"paths"})

    def _origin(self) -> str:
        return ", ".join(self.paths)


class HubSource(RecordSource):
    """A dataset of the Hugging Face Hub at one commit."""

    type: Literal["hub"]
    dataset: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Owner and name, like openai/gsm8k."""
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    """Commit of the dataset, 40 hexadecimal digits, so the recipe always reads the same rows."""
    split: str = "train"
    """Split of the dataset to read, with slices as in ``datasets``: ``train[:5000]``, ``train[10%:20%]``,
    ``train+test``."""
    config: str | None = None
    """Configuration (subset) of the dataset, if it has several."""
    data_dir: str | None = None
    """Folder inside the dataset's repository."""
    files: list[str] | None = Field(None, min_length=1)
    """Files of the repository, by path or pattern, to read as they are: files that no configuration covers (Open
    Assistant's trees), or whose field types should not be inferred. ``split`` and ``config`` are then ignored."""
    streaming: bool = True
    """Stream the records. False downloads the dataset into the Hub's cache first, which is faster for a recipe that is
    built repeatedly."""

    @field_validator("split")
    @classmethod
    def _check_split(cls, split: str) -> str:
        parse_split(split)
        return split

    @model_validator(mode="before")
    @classmethod
    def _refuse_dataset_as_name(cls, values: Any) -> Any:
        # ``name`` looks like the dataset's name to people who know load_dataset, so say what it is.
        if isinstance(values, dict) and "dataset" not in values and "/" in str(values.get("name", "")):
            raise ValueError(f"a Hub dataset is written as dataset: {values['name']}; name is its name in the ledger")
        return values

    def _origin(self) -> str:
        if self.files:
            return f"{self.dataset} {', '.join(self.files)}"
        return " ".join(part for part in (self.dataset, self.config, self.data_dir, self.split) if part)


class PythonSource(RecordSource):
    """A generator function of your own."""

    type: Literal["python"]
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """``package.module:function``, importable from the current directory; yields dicts, the same ones each time."""
    arguments: dict[str, Any] = Field({})
    """Keyword arguments of the call."""

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        try:
            check_arguments(self.function, self.arguments, "function", positional=0)
        except UserError as error:
            raise ValueError(str(error).removeprefix("function.")) from None
        return self

    def _origin(self) -> str:
        return self.function


class ArtifactSource(SourceConfig):
    """The finished data artifact of an earlier run, or a built dataset: a folder with ``record.json``."""

    type: Literal["artifact"]
    path: UserPath
    """The folder; a relative one starts at the recipe's. The source is identified by the key in its record."""
    split: Literal["all", "train", "test"] = "all"
    """Splits of it to read."""
    format: ClassVar[Literal["rows"]] = "rows"
    options: ClassVar[FormatOptions] = FormatOptions()

    identified: ClassVar[frozenset[str]] = frozenset({"path"})

    def _origin(self) -> str:
        return self.path


class InputSource(SourceConfig):
    """An input of the pipeline's ``data`` stage: an artifact with data."""

    type: Literal["input"]
    index: int = Field(0, ge=0)
    """Number of the stage's input, counted from 0."""
    split: Literal["all", "train", "test"] = "all"
    """Splits of it to read."""
    format: ClassVar[Literal["rows"]] = "rows"
    options: ClassVar[FormatOptions] = FormatOptions()

    def _origin(self) -> str:
        return f"input {self.index}" if self.split == "all" else f"input {self.index} {self.split}"


class AnnotationsSource(SourceConfig):
    """A set of annotations in the store (``align annotate``): verdicts of people on pairs of answers.

    For kind ``preferences`` a row is a pair with its margin, for ``unpaired`` an answer with a label, for
    ``instructions`` an answer that an annotator wrote.
    """

    type: Literal["annotations"]
    set: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    """Name of the set: ``helpful-1``."""
    store: UserPath | None = None
    """Folder of the store with the set; by default ``$ALIGN_STORE``, else ``store`` in the current folder."""
    annotators: list[str] | None = Field(None, min_length=1)
    """Pseudonyms whose answers count; all by default."""
    format: ClassVar[Literal["rows"]] = "rows"
    options: ClassVar[FormatOptions] = FormatOptions()

    identified: ClassVar[frozenset[str]] = frozenset({"store"})

    def _origin(self) -> str:
        return f"annotations {self.set}"


Source = Annotated[
    EmbeddedSource
    | GymSource
    | FilesSource
    | HubSource
    | PythonSource
    | ArtifactSource
    | InputSource
    | AnnotationsSource,
    Field(discriminator="type"),
]


def labels(sources: Sequence[SourceConfig]) -> list[str]:
    """Return one label for each source, all different: a default label that repeats gets a number.

    Raises ``ValueError`` for a ``name`` that two sources have.
    """
    names = Counter(source.name for source in sources if source.name is not None)
    repeated = next((name for name, count in names.items() if count > 1), None)
    if repeated is not None:
        raise ValueError(f"two sources are named '{repeated}'; their rows could not be told apart. Rename one")
    unique: list[str] = []
    for source in sources:
        # Only default labels get a number; names are unique already.
        label = source.label
        number = 2
        while source.name is None and (label in unique or label in names):
            label = f"{source.label} ({number})"
            number += 1
        unique.append(label)
    return unique


PART = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class SplitPart:
    """A split, and the first and the last row to read; None stands for its own first or last row."""

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def is_stream(self) -> bool:
        """True if the rows can be read without knowing their number."""
        bounds = [bound for bound in (self.start, self.stop) if bound is not None]
        return not any(bound.endswith("%") or bound.startswith("-") for bound in bounds)

    def bounds(self, rows: int | None = None) -> tuple[int, int | None]:
        """Return the numbers of the first row and of the row after the last, from 0; ``rows`` is their number.

        None as the second number stands for the end. A share of the rows is rounded to the nearest row, as in
        ``datasets``.
        """
        first = _row(self.start, rows)
        return (0 if first is None else first), _row(self.stop, rows)


def _row(bound: str | None, rows: int | None) -> int | None:
    if bound is None:
        return None
    if bound.endswith("%"):
        assert rows is not None
        number = round(int(bound[:-1]) * rows / 100)
    else:
        number = int(bound)
    if number < 0:
        assert rows is not None
        number += rows
    return max(0, number if rows is None else min(number, rows))


def parse_split(split: str) -> list[SplitPart]:
    """Return the parts of a split. Raises ``ValueError`` for text that is none."""
    parts = []
    for text in split.split("+"):
        match = PART.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"'{text}' is not a split; write a name, with rows in brackets: train, train[:5000], train[10%:20%], "
                "train+test"
            )
        parts.append(SplitPart(match["name"], match["start"], match["stop"]))
    return parts
