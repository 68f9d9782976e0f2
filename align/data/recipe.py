"""Recipes: which sources make a dataset, what is left out, and how it is split. Torch-free.

A recipe is identified by its content, the digests of the files it reads and the commits of its Hub sources.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from align.artifacts import Kind
from align.data.formats import PAIRED
from align.data.source_configs import EmbeddedSource, FilesSource, Source
from align.stage import Config
from align.validation import load_yaml, validate


class Filters(Config):
    """Rows to leave out; every one is counted in ledger.json."""

    max_chars: int | None = Field(None, ge=1)
    """Longest prompt plus its longer reply, in characters; about four to a token in English."""
    max_prompt_chars: int | None = Field(None, ge=1)
    """Longest prompt, all turns together, in characters."""
    max_turns: int | None = Field(None, ge=1)
    """Most messages in a prompt; 1 keeps single questions only."""


class Recipe(Config):
    """One dataset."""

    description: str = ""
    """What the dataset is; changes nothing."""
    kind: Literal["instructions", "preferences", "prompts"]
    """What a row has beside its prompt: one reply, a better and a worse one, or nothing."""
    sources: list[Source] = Field(min_length=1)
    """Where the rows come from, in order."""
    filters: Filters = Filters()
    """Rows to leave out."""
    test_size: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts held out for testing; a prompt's side depends on it and ``seed`` alone."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the generator, the split and the choice under ``max_rows``; the pipeline's seed plays no part."""
    max_rows: int | None = Field(None, ge=2)
    """Keep this many rows at most, chosen by ``seed``."""
    files_variable: str | None = Field(None, pattern=r"^[A-Z][A-Z0-9_]*$")
    """Environment variable that, where set, names local files to read instead of the sources."""

    @model_validator(mode="after")
    def _formats_fit(self) -> Self:
        for index, source in enumerate(self.sources):
            form = source.type if source.format == "rows" else source.format
            if self.kind == "preferences" and form not in PAIRED:
                raise ValueError(
                    f"kind is preferences, but sources[{index}] ({form}) has one reply per prompt; "
                    f"use a format with pairs ({', '.join(PAIRED)}) or kind instructions"
                )
            if self.kind == "instructions" and form == "prompt":
                raise ValueError(f"kind is instructions, but sources[{index}] has no replies; use kind prompts")
        parts = {source.part for source in self.sources}
        if parts in ({"train"}, {"test"}):
            raise ValueError(f"every source goes to {parts.pop()}, which leaves the other split empty")
        return self

    def makes(self) -> Kind:
        """The artifact kind that a stage with this recipe makes."""
        return {
            "instructions": Kind.INSTRUCTIONS, "preferences": Kind.PREFERENCES, "prompts": Kind.PROMPTS
        }[self.kind]  # fmt: skip

    def with_files(self, paths: list[str]) -> Recipe:
        """The recipe with local files, in the format of its first readable source, instead of its sources.

        Raises ``ValueError`` where no source has a format.
        """
        form = next((s.format for s in self.sources if not isinstance(s, EmbeddedSource)), None)
        if form is None:
            raise ValueError("its sources are generated, so there is no format to read files in")
        return self.model_copy(update={"sources": [FilesSource(type="files", paths=paths, format=form)]})


def load_recipe(path: str, base: Path) -> Recipe:
    """Read and check a recipe; a relative path starts at ``base``.

    Raises ``UserError`` for a file that does not exist, does not parse, or has an unknown or wrong key.
    """
    return validate(Recipe, load_yaml(base / path), path)
