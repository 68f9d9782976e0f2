"""Settings of a recipe: the sources of a dataset, the steps that its rows pass, and how it is split.

A recipe is identified by its content, the digests of the files it reads and the commits of its Hub sources.
"""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config
from align.config.recipe.format_options import KINDS, SEVERAL, formats_for
from align.config.recipe.record_mapping import RecordMapping
from align.config.recipe.source_settings import FilesSource, RecordSource, Source, labels
from align.config.recipe.step_settings import CapStep, MixStep
from align.config.user_functions import add_module_folder
from align.config.user_paths import locate, settle, user_path
from align.config.validation import suggest, validate
from align.config.yaml import load_yaml
from align.registry import Step, loaded
from align.store.artifacts import Kind

if TYPE_CHECKING:
    AnyStep = Any
else:
    AnyStep = Annotated[
        functools.reduce(operator.or_, loaded(Step, lambda step: step.settings).values()), Field(discriminator="type")
    ]
    """Settings of any step."""


class Recipe(Config):
    """One dataset."""

    description: str = ""
    """A description of the dataset, for the card; changes no row."""
    language: list[str] = Field([])
    """Languages of its texts as codes (en, de), for the card; changes no row."""
    kind: Literal["instructions", "preferences", "prompts", "unpaired", "texts"]
    """Contents of a row: a prompt with one reply, with a better and a worse reply, with none, or with a good or bad
    reply; for ``texts``, a plain text without a prompt (stage ``pretrain``)."""
    sources: list[Source] = Field(min_length=1)
    """Sources of the rows, in order."""
    steps: list[AnyStep] = Field([])
    """Steps that the rows pass, in order. Equal rows, and prompts that are in both splits, are dropped in any case."""
    on_error: Literal["stop", "drop"] = "stop"
    """A record that cannot be read or converted ends the build, or is dropped and counted, with file and line."""
    near_duplicate_prompts: float | None = Field(0.8, gt=0, le=1)
    """Prompts whose words overlap this much (estimated Jaccard similarity of their shingles) go to the same split; null
    keeps only equal prompts together, which recipes with templated prompts need."""
    test_size: float = Field(0.1, ge=0, le=1)
    """Share of the prompts held out for testing. A prompt's split depends only on the prompt and ``seed``. 1.0 leaves
    no rows to train on, 0 no rows to test on."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the generator, the split and the selection under ``max_rows``; independent of the pipeline's seed."""
    max_rows: int | None = Field(None, ge=2)
    """Keep at most this many rows, selected by ``seed``."""
    files_variable: str | None = Field(None, pattern=r"^[A-Z][A-Z0-9_]*$")
    """Environment variable with paths of local files. If it is set, they are read instead of the sources."""

    @model_validator(mode="after")
    def _check_mix_is_last(self) -> Self:
        if any(step.type == "mix" for step in self.steps[:-1]):
            raise ValueError("a step comes after mix, which repeats rows; mix must be the last step")
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        for index, step in enumerate(self.steps):
            if self.kind == "texts" and step.type in ("pairs", "score") and getattr(step, "by", "") != "function":
                raise ValueError(f"kind is texts, and steps[{index}] ({step.type}) is about answers; remove it")
            if self.kind != "texts" and step.type == "divide":
                raise ValueError(f"kind is {self.kind}, and steps[{index}] (divide) is about texts; remove it")
        return self

    @model_validator(mode="after")
    def _check_source_names(self) -> Self:
        # Steps name sources by the labels that the ledger shows.
        labels_in_ledger = labels(self.sources)
        for index, step in enumerate(self.steps):
            names: list[str] = []
            if isinstance(step, MixStep):
                names = [*(step.weights or {}), *(step.epochs or {})]
            if isinstance(step, CapStep):
                names = list(step.sources)
            for name in names:
                if name not in labels_in_ledger:
                    raise ValueError(
                        f"steps[{index}] ({step.type}): there is no source '{name}'; there are "
                        f"{', '.join(map(repr, labels_in_ledger))}.{suggest(name, labels_in_ledger)}"
                    )
        return self

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        labels(self.sources)
        for index, source in enumerate(self.sources):
            form: str = source.format
            # An automatic format is known only when the records are read; the build checks it then.
            if form == "auto" and not (isinstance(source, RecordSource) and source.grouped is not None):
                continue
            form = "scored" if form == "auto" else form
            if source.type in ("embedded", "reasoning_gym") and self.kind not in ("instructions", "prompts", "texts"):
                raise ValueError(
                    f"kind is {self.kind}, but sources[{index}] ({source.type}) has one reply per prompt; "
                    "use kind instructions or prompts"
                )
            if self.kind not in KINDS[form]:
                able = ", ".join(formats_for(self.kind))
                raise ValueError(
                    f"kind is {self.kind}, which sources[{index}] (format {form}) cannot give; formats that can: {able}"
                )
            if self.lacks_pairs(form):
                raise ValueError(
                    f"sources[{index}] (format {form}) has several answers to a prompt; add the step `type: pairs`, "
                    "which makes pairs of them"
                )
        parts = {source.part for source in self.sources}
        if parts in ({"train"}, {"test"}):
            part = parts.pop()
            if self.empty_split != {"train": "test", "test": "train"}[part]:
                size = {"train": "0", "test": "1.0"}[part]
                raise ValueError(
                    f"every source goes to {part}, which leaves the other split empty; if that is meant, write "
                    f"test_size: {size}"
                )
        return self

    @property
    def empty_split(self) -> str | None:
        """The split that has no rows on purpose."""
        return {0.0: "test", 1.0: "train"}.get(self.test_size)

    def lacks_pairs(self, form: str) -> bool:
        """Return True where records of a format have several answers to compare, and no step makes pairs of them."""
        makes_pairs = any(step.type == "pairs" for step in self.steps)
        return self.kind in ("preferences", "unpaired") and form in SEVERAL and not makes_pairs

    def makes(self) -> Kind:
        """Return the artifact kind that a stage with this recipe makes."""
        return Kind[self.kind.upper()]

    def with_files(self, paths: list[str]) -> Recipe:
        """Return the recipe with local files in place of its sources, in the format of its first readable source.

        Raises ``ValueError`` if no source has a format.
        """
        # Local files usually are copies of the recipe's own source, so they have its format.
        first = next((source for source in self.sources if isinstance(source, RecordSource)), None)
        if first is None:
            raise ValueError("its sources are generated, so there is no format to read files in")
        source = FilesSource(
            type="files",
            name=first.name,
            paths=paths,
            format=first.format,
            options=first.options,
            license=first.license,
            **{name: getattr(first, name) for name in RecordMapping.model_fields if name in first.model_fields_set},
        )
        return self.model_copy(update={"sources": [source]})


def load_recipe(path: str, base: Path) -> Recipe:
    """Load and check a recipe.

    A relative ``path`` starts at ``base``, and paths inside the recipe start at its folder.

    Raises ``UserError`` for a file that does not exist, does not parse, or has an unknown or wrong key.
    """
    file = user_path(path, base)
    raw = locate(load_yaml(file), file)
    add_module_folder(file)
    return validate(Recipe, settle(Recipe, raw, base, path), path)
