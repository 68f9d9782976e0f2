"""Fields that evaluation tasks share: the source of their records, and the sampling of answers. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from align.config.base import Config
from align.config.recipe.record_mapping import RecordColumns, RecordMapping
from align.config.recipe.source_settings import KNOWN_DATASETS
from align.config.user_paths import UserPath

HUB_FIELDS = ("dataset", "revision", "config", "split")
"""Fields that name records on the Hub; a task has these or ``files``."""

_COLUMNS = json.loads(Path(__file__).with_name("columns.json").read_text(encoding="utf-8"))
CHOICE_COLUMNS: tuple[str, ...] = tuple(_COLUMNS["multiple_choice"])
"""Fields that the formats of multiple choice read."""
JUDGED_COLUMNS: tuple[str, ...] = tuple(_COLUMNS["judged"])
"""Fields that a judged task reads."""


class TaskConfig(Config):
    """Settings that every task has. A subclass has ``task: Literal[...]``; the task's registry maps it to its code.

    Fields that only give the location of data belong in ``identified``, as in any config.
    """

    @property
    def kind(self) -> str:
        """The kind of the task: ``ifeval``."""
        return str(getattr(self, "task", ""))


class RecordFields(RecordColumns):
    """Fields of a task that reads records; a task's config inherits this class first, then ``TaskConfig``."""

    files: list[UserPath] | None = Field(None, min_length=1)
    """Paths or globs of its files (.json, .jsonl, .csv, .tsv, .parquet, the text formats also compressed), instead of
    the Hub; relative ones start at the YAML file."""
    dataset: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Owner and name on the Hub; by default the benchmark's usual dataset, if any."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """The dataset's commit, 40 hexadecimal digits, so the numbers always mean the same records."""
    config: str | None = None
    """The dataset's configuration (subset), if it has several."""
    split: str | None = None
    """The dataset's split; ``test`` by default, or a known benchmark's usual split."""
    max_items: int | None = Field(None, ge=1)
    """Take at most this many records, drawn by the run's seed and kept in order; fewer make wider intervals."""

    identified: ClassVar[frozenset[str]] = frozenset({"files"})

    def hub_defaults(self) -> Mapping[str, str] | None:
        """Return the benchmark's usual ``dataset``, ``config`` and ``split`` on the Hub; None if it has none."""
        return KNOWN_DATASETS.get(str(getattr(self, "task", "")))

    def record_mapping(self) -> dict[str, Any]:
        """Return the settings that are set and that a recipe's source also has; ``columns`` are the task's."""
        names = (name for name in RecordMapping.model_fields if name in self.model_fields_set)
        left_out = () if isinstance(self, RecordMapping) else ("columns",)
        return {name: getattr(self, name) for name in names if name not in left_out}

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        hub_fields = [name for name in HUB_FIELDS if getattr(self, name) is not None]
        if self.files is not None:
            if hub_fields:
                raise ValueError(f"it has files, so '{hub_fields[0]}' has no effect; drop one of them")
            return self
        for name in ("header", "records", "delimiter", "encoding"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is about files, and there are none; name them, or take it out")
        defaults = self.hub_defaults()
        dataset = self.dataset or (defaults or {}).get("dataset")
        if dataset is None:
            raise ValueError("give its files, or its dataset and revision on the Hub")
        if self.revision is None:
            raise ValueError(
                f"give its files, or `revision`: the commit of {dataset} on the Hub (40 hexadecimal digits)"
            )
        return self


class TemperatureFields(Config):
    """Fields of a task in which systems sample; ``SamplingFields`` also has them."""

    temperature: float = Field(0.0, ge=0)
    """0 decodes greedily, as the published numbers do; above 0 answers are sampled with the run's seed."""
    samples: int = Field(1, ge=1)
    """Answers to each item, averaged; more than one needs a temperature above 0."""

    @model_validator(mode="after")
    def _check_samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 would be identical at temperature 0; raise temperature or drop samples")
        return self


class SamplingFields(TemperatureFields):
    """Fields of a task that samples answers; a task's config inherits them with ``TaskConfig``."""

    max_tokens: int = Field(512, ge=1)
    """Longest answer in tokens; a longer one is cut off there and scored as it is."""

    def sampling_settings(self, seed: int) -> dict[str, Any]:
        """Return the sampling settings for the scorecard. JSON-able."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "samples": self.samples, "seed": seed}
