"""Stage ``data``: build a dataset from a recipe, split by prompt, with a ledger of every record read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from align.artifacts import Kind
from align.data import checkers, embedded
from align.data.assemble import assemble, summary_lines
from align.data.recipe import Recipe, load_recipe
from align.data.rows import write_rows
from align.data.source_configs import EmbeddedSource, FilesSource, HubSource
from align.data.sources import identity
from align.errors import UserError
from align.fingerprint import digest
from align.stage import Config, StageContext


class DataConfig(Config):
    """Which recipe, and where its files are."""

    recipe: str
    """Path of a recipe (data_recipes/*.yaml), relative to the current directory; its content is what counts."""
    files: list[str] | None = Field(None, min_length=1)
    """Local files (paths or globs) to read instead of the recipe's sources, in the recipe's format."""

    max_rows: int | None = Field(None, ge=2)
    """Keep this many rows at most, both splits together; comes before the recipe's own."""

    identified: ClassVar[frozenset[str]] = frozenset({"recipe", "files", "max_rows"})

    def makes(self) -> Kind:
        """The kind the recipe says."""
        return load_recipe(self.recipe, Path.cwd()).makes()

    def resolved(self, base: Path) -> Recipe:
        """The recipe as it will run: with ``files``, or those of its environment variable, in its sources' place."""
        recipe = load_recipe(self.recipe, base)
        if self.max_rows is not None:
            recipe = recipe.model_copy(update={"max_rows": self.max_rows})
        files, origin = self.files, "files"
        if files is None and recipe.files_variable and os.environ.get(recipe.files_variable):
            origin = f"${recipe.files_variable}"
            files = [part for part in os.environ[recipe.files_variable].split(os.pathsep) if part]
        if not files:
            return recipe
        try:
            return recipe.with_files(files)
        except ValueError as error:
            raise UserError(f"{origin} cannot replace the sources of {self.recipe}: {error}.") from None

    def identities(self, base: Path) -> dict[str, str]:
        """The recipe's content, and the digest, commit or generator version of each source."""
        recipe = self.resolved(base)
        content = recipe.model_dump(mode="python", exclude={"description", "files_variable"})
        found = {}
        for index, source in enumerate(recipe.sources):
            if isinstance(source, EmbeddedSource):
                found[f"sources[{index}]"] = f"embedded version {embedded.VERSION}, checks {checkers.VERSION}"
            elif isinstance(source, HubSource):
                found[f"sources[{index}]"] = f"{source.dataset}@{source.revision}"
            elif isinstance(source, FilesSource):
                content["sources"][index].pop("paths")  # the files' digests stand for them
                for name, value in identity(source, base).items():
                    found[f"sources[{index}] {name}"] = value
        return {"recipe": digest(content), **found}


def run(context: StageContext) -> dict[str, Any]:
    """Write ``train.parquet``, ``test.parquet`` and ``ledger.json``. Returns the row counts."""
    config: DataConfig = context.config
    base = Path.cwd()
    recipe = config.resolved(base)
    files = [source for source in recipe.sources if isinstance(source, FilesSource)]
    if config.files and files:
        print(f"reading {len(config.files)} local patterns instead of the recipe's sources")
    dataset = assemble(recipe, base, lambda done: context.progress(done, done, unit="rows"))
    for line in summary_lines(dataset.ledger):
        print(line)
    write_rows(context.output / "train.parquet", dataset.train)
    write_rows(context.output / "test.parquet", dataset.test)
    (context.output / "ledger.json").write_text(json.dumps(dataset.ledger, indent=2) + "\n", encoding="utf-8")
    total = len(dataset.train) + len(dataset.test)
    context.progress(total, total, unit="rows")
    replies = [
        len(message["content"].split())
        for row in dataset.train
        for name in ("completion", "chosen")
        for message in row.get(name, [])
    ]
    return {
        "kind": recipe.kind,
        "train_rows": len(dataset.train),
        "test_rows": len(dataset.test),
        "rows_in": dataset.ledger["rows_in"],
        "dropped": dataset.ledger["dropped"],
        "mean_reply_words": round(sum(replies) / len(replies), 1) if replies else None,
    }
