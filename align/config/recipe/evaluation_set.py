"""Settings of an evaluation set that training rows must not contain, and the sets that are known by name.

A known name needs only a commit of the Hub. Use files if there is no network.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from align.config.base import Config
from align.config.known_datasets import KNOWN_DATASETS
from align.config.located_paths import UserPath
from align.config.recipe.source_settings import FilesSource, HubSource
from align.config.validation import suggest, validate_plain


class EvaluationSet(Config):
    """One evaluation set."""

    name: str = Field(min_length=1, max_length=100)
    """Name in the ledger. A known name (arc_challenge, arc_easy, gsm8k, ifbench, ifeval, mmlu, mt_bench, truthfulqa,
    xstest) needs only ``revision``."""
    files: list[UserPath] | None = Field(None, min_length=1)
    """Paths or globs of its files, relative to the recipe's folder, instead of the Hub."""
    dataset: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Owner and name on the Hub of a set that is not known by name."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Commit of the dataset, 40 hexadecimal digits."""
    config: str | None = None
    """Configuration (subset) of the dataset, if it has several."""
    split: str | None = None
    """Split of the dataset; ``test`` by default, or a known name's usual split."""
    fields: list[str] | None = Field(None, min_length=1)
    """Fields that make up the question, joined by a line break; ``a.b`` is field b of a. By default the first one
    present of prompt, question, turns, instruction, problem, goal, query, text. The texts of a list are searched for
    one by one."""

    identified: ClassVar[frozenset[str]] = frozenset({"files"})

    @model_validator(mode="after")
    def _comes_from_one_place(self) -> Self:
        if self.files is not None:
            ignored = [name for name in ("dataset", "revision", "config", "split") if getattr(self, name) is not None]
            if ignored:
                raise ValueError(
                    f"evaluation set '{self.name}' has files, so '{ignored[0]}' means nothing; drop one of them"
                )
        elif self.dataset is None and self.name not in KNOWN_DATASETS:
            raise ValueError(
                f"evaluation set '{self.name}': give its files, or its dataset and revision on the Hub; known by name "
                f"are {', '.join(KNOWN_DATASETS)}.{suggest(self.name, KNOWN_DATASETS)}"
            )
        elif self.revision is None:
            raise ValueError(
                f"evaluation set '{self.name}' needs `revision`, the commit of "
                f"{self.dataset or KNOWN_DATASETS[self.name]['dataset']} on the Hub (40 hexadecimal digits), or `files`"
            )
        return self

    def source(self) -> FilesSource | HubSource:
        """Return the source that its records are read from."""
        if self.files is not None:
            return FilesSource(type="files", paths=self.files)
        usual = KNOWN_DATASETS.get(self.name, {}) if self.dataset is None else {"dataset": self.dataset}
        # The usual values of a known name, overridden by what the recipe states.
        settings = {"type": "hub", "split": "test", **usual}
        for name in ("config", "split", "revision"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        return validate_plain(HubSource, settings)
