"""Settings of a recipe's sources: where records are, how they are spelled, under which license. Torch-free.

Reading them is in ``sources.py``, converting their records in ``formats``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config
from align.config.validation import suggest
from align.data import embedded
from align.data.formats import Format, FormatOptions

Part = Literal["split", "train", "test"]


class SourceConfig(Config):
    """What every source has."""

    name: str | None = Field(None, min_length=1, max_length=200)
    """What the ledger, the card and each row's ``source`` call it; by default where it comes from."""
    license: str | None = Field(None, min_length=1)
    """SPDX identifier (Apache-2.0) or words; stands on the card, since a mixture inherits the strictest."""
    part: Part = "split"
    """Where the rows go: divided by ``test_size``, or all to one side."""

    @property
    def label(self) -> str:
        """``name``, or where the records come from."""
        return self.name or self._origin()

    def _origin(self) -> str:
        raise NotImplementedError


class RecordSource(SourceConfig):
    """A source whose records are spelled in one of the field's formats."""

    format: Format = "auto"
    """How a record is spelled; ``auto`` looks at the first hundred records and says what it chose and why."""
    options: FormatOptions = FormatOptions()
    """What is taken of a record where its format leaves a choice."""


class EmbeddedSource(SourceConfig):
    """The project's own generator of checkable instructions."""

    type: Literal["embedded"]
    size: int = Field(4000, ge=1, le=embedded.MAX_ROWS)
    """Rows to generate, before the split."""
    families: list[str] | None = Field(None, min_length=1)
    """Families of instructions, by name; all of them by default."""
    format: ClassVar[Literal["rows"]] = "rows"
    options: ClassVar[FormatOptions] = FormatOptions()

    def _origin(self) -> str:
        return "embedded"

    @model_validator(mode="after")
    def _known_families(self) -> Self:
        for name in self.families or []:
            if name not in embedded.FAMILIES:
                raise ValueError(f"there is no family '{name}'.{suggest(name, embedded.FAMILIES)}")
        return self


class FilesSource(RecordSource):
    """Local files."""

    type: Literal["files"]
    paths: list[str] = Field(min_length=1)
    """Paths or globs of .json, .jsonl, .csv, .tsv or .parquet files, the text ones also .gz, .bz2, .xz or .zst, and for
    kind ``texts`` .txt and .md files, a document each; relative to the current directory."""

    identified: ClassVar[frozenset[str]] = frozenset({"paths"})

    def _origin(self) -> str:
        return ", ".join(self.paths)


class HubSource(RecordSource):
    """A dataset of the Hugging Face Hub at one commit."""

    type: Literal["hub"]
    dataset: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Owner and name, like openai/gsm8k."""
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    """The dataset's commit, 40 hexadecimal digits, so that the recipe always means the same rows."""
    split: str = "train"
    """The dataset's own split to read."""
    config: str | None = None
    """The dataset's configuration (subset) where it has several."""
    data_dir: str | None = None
    """Folder inside the dataset's repository."""
    files: list[str] | None = Field(None, min_length=1)
    """Files of the repository, by path or pattern, to read as they are: those that its configurations leave out (Open
    Assistant's trees), or whose field types should not be inferred. ``split`` and ``config`` then mean nothing."""
    streaming: bool = True
    """Read records as they arrive; false downloads the dataset into the Hub's cache first, which pays when a recipe is
    built again and again."""

    @model_validator(mode="before")
    @classmethod
    def _dataset_was_name(cls, given: Any) -> Any:
        if isinstance(given, dict) and "dataset" not in given and "/" in str(given.get("name", "")):
            raise ValueError(f"a Hub dataset is written as dataset: {given['name']}; name is what the ledger calls it")
        return given

    def _origin(self) -> str:
        if self.files:
            return f"{self.dataset} {', '.join(self.files)}"
        return " ".join(part for part in (self.dataset, self.config, self.data_dir, self.split) if part)


class PythonSource(RecordSource):
    """A generator function of one's own."""

    type: Literal["python"]
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """``package.module:function``, importable from the current directory; yields dicts, the same each time."""
    arguments: dict[str, Any] = Field({})
    """Keyword arguments it is called with."""

    def _origin(self) -> str:
        return self.function


class ArtifactSource(SourceConfig):
    """The finished data artifact of an earlier run, or a built dataset: a folder with ``record.json``."""

    type: Literal["artifact"]
    path: str
    """The folder; relative to the current directory. What counts is the key in its record."""
    split: Literal["all", "train", "test"] = "all"
    """Which of its splits to read."""
    format: ClassVar[Literal["rows"]] = "rows"
    options: ClassVar[FormatOptions] = FormatOptions()

    identified: ClassVar[frozenset[str]] = frozenset({"path"})

    def _origin(self) -> str:
        return self.path


class InputSource(SourceConfig):
    """A data artifact that the pipeline's ``data`` stage was given."""

    type: Literal["input"]
    index: int = Field(0, ge=0)
    """Which of the stage's inputs, counted from 0."""
    split: Literal["all", "train", "test"] = "all"
    """Which of its splits to read."""
    format: ClassVar[Literal["rows"]] = "rows"
    options: ClassVar[FormatOptions] = FormatOptions()

    def _origin(self) -> str:
        return f"input {self.index}" if self.split == "all" else f"input {self.index} {self.split}"


Source = Annotated[
    EmbeddedSource | FilesSource | HubSource | PythonSource | ArtifactSource | InputSource,
    Field(discriminator="type"),
]


def labels(sources: Sequence[SourceConfig]) -> list[str]:
    """One label for each source, all different: a default that repeats gets a number.

    Raises ``ValueError`` for a ``name`` that two sources have.
    """
    given = Counter(source.name for source in sources if source.name is not None)
    twice = next((name for name, count in given.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"two sources are named '{twice}'; rows could not be told apart. Rename one")
    found: list[str] = []
    for source in sources:
        label, number = source.label, 2
        while source.name is None and (label in found or label in given):
            label, number = f"{source.label} ({number})", number + 1
        found.append(label)
    return found
