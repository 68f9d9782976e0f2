"""Reward models as scorers: one, or several whose scores are combined. Torch-free at import."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from align.config.base import PrecisionSetting
from align.config.runtime import Runtime
from align.data.rows import Row
from align.scoring.scored import Scored, Scorer

if TYPE_CHECKING:
    from align.models.reward import RewardModel

Combination = Literal["mean", "minimum", "uncertainty"]
"""Combination of the scores of several reward models (arXiv 2310.02743): their mean; their minimum, so a response
must satisfy all; or the mean minus ``weight`` times their variance."""


@dataclass
class RewardScorer(Scorer):
    """A reward model, which is loaded when it scores for the first time: until then an engine needs the memory.

    Prompts are rendered with the reward model's template.
    """

    load: Callable[[], RewardModel]
    _model: RewardModel | None = field(default=None, init=False)

    @classmethod
    def of(cls, model: RewardModel) -> RewardScorer:
        """Return the scorer of a model that is loaded."""
        return cls(lambda: model)

    def open(self) -> None:
        """Load the model now."""
        self._opened()

    def _opened(self) -> RewardModel:
        if self._model is None:
            self._model = self.load()
            if self.report is not None:
                self._model.on_progress = self.report
        return self._model

    def score(self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None) -> Scored:
        """Return one score per response; a truncated one is read without an end of turn."""
        are_finished = None if truncated is None else [not cut for cut in truncated]
        tools = [row.get("tools") for row in rows]
        prompts = [row["prompt"] for row in rows]
        return Scored(self._opened().score(prompts, list(responses), are_finished, tools))

    def close(self) -> None:
        """Free the model; another score would load it again."""
        self._model = None


@dataclass(frozen=True)
class Ensemble(Scorer):
    """Combines several scorers. If they disagree, their training data did not decide."""

    members: tuple[Scorer, ...]
    how: Combination
    weight: float = 1.0
    """Of the variance, for ``uncertainty``."""

    def score(self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None) -> Scored:
        """Return the combined scores, and the members' standard deviation as ``spread``."""
        by_member = [scorer.score(rows, responses, truncated).total for scorer in self.members]
        by_response = list(zip(*by_member, strict=True))
        combined = [combine(scores, self.how, self.weight) for scores in by_response]
        return Scored(combined, metrics={"spread": [statistics.pstdev(scores) for scores in by_response]})


def combine(scores: Sequence[float], how: Combination, weight: float) -> float:
    """Return one score from several of the same response; the variance is the population's."""
    if how == "minimum":
        return min(scores)
    mean = statistics.fmean(scores)
    if how == "uncertainty":
        return mean - weight * statistics.pvariance(scores)
    return mean


def load_checkpoint(folder: Path, runtime: Runtime, setting: PrecisionSetting) -> RewardModel:
    """Return the reward model of a checkpoint."""
    from align.models.compute.precision import resolve_precision
    from align.models.compute.processes import device_of, use_threads
    from align.models.reward import RewardModel

    use_threads(runtime)
    device = device_of(runtime)
    return RewardModel(folder, device, resolve_precision(setting, device))
