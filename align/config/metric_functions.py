"""Settings of functions that score responses in an evaluation. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.config.base import Config

METRIC_NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"


class MetricFunction(Config):
    """A function that scores responses, as a metric of the scorecard."""

    function: str
    """``gold``, or ``package.module:function``."""
    name: str | None = Field(None, pattern=METRIC_NAME)
    """Name of the metric; by default the function's."""
    better: Literal["higher", "lower"] = "higher"
    """Scores that are better."""
    arguments: dict[str, Any] = Field({})
    """Keyword arguments for the function in addition to rows and responses."""

    keyed_when_set: ClassVar[frozenset[str]] = frozenset({"arguments"})

    @property
    def metric(self) -> str:
        """Name in the scorecard, in gates and on the page."""
        return self.name or self.function.rpartition(":")[2]


MetricFunctions = str | Sequence[str | MetricFunction]
"""One function or several."""


def metric_functions(score: MetricFunctions | None) -> list[MetricFunction]:
    """Return the functions of a ``score`` setting, in order; none for None."""
    entries: Sequence[str | MetricFunction] = [score] if isinstance(score, str) else score or []
    return [MetricFunction(function=entry) if isinstance(entry, str) else entry for entry in entries]
