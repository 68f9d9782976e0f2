"""The ``score`` step: a number for each row, from a model or a function, and limits on it.

``reward``: a reward model's score of the reply. ``perplexity``: exp of the mean negative log-likelihood of the reply's
tokens, given the prompt. ``ifd``: instruction-following difficulty (arXiv 2308.12032, eq. 3), the perplexity of the
reply given the prompt divided by the perplexity of only the reply: near 1 the prompt helps little, above 1 it
misleads. The last turn of an answer is its reply; the turns before it count as prompt. ``function``: your function. The
number stays in the rows as ``score``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from align.config.recipe.step_settings import ScoreStep
from align.config.user_functions import function_identity
from align.config.user_paths import user_path
from align.data.rows import Row
from align.data.steps.step import ModelLoaders, StepContext, Table, Verdict, keep_all, require_models
from align.errors import UserError
from align.pipeline.registry import load_object

BELOW = "score too low"
ABOVE = "score too high"
NO_SCORE = "no score"


RowScorer = Callable[[list[Row]], list[float]]
"""A function from rows to numbers; NaN if a row has none."""


def scorer_identities(config: ScoreStep, base: Path, models: ModelLoaders | None) -> dict[str, str]:
    """Return the identity of the function's code, or the digests of the model's files."""
    if config.function is not None:
        return {"function": function_identity(config.function)}
    assert config.model is not None
    if config.model.startswith("input "):
        return {}  # the key of an input is part of the stage's own key
    folder = model_folder(config.model, base, ())
    digests = require_models(models).digests(folder)
    return {f"model {name}": f"sha256:{digest}" for name, digest in digests.items()}


def model_folder(name: str, base: Path, inputs: tuple[Path, ...]) -> Path:
    """Return the transformers folder behind ``model``. Raises ``UserError`` when there is none."""
    if name.startswith("input "):
        number = name.removeprefix("input ").strip()
        if not number.isdigit() or int(number) >= len(inputs):
            raise UserError(f"score.model is '{name}', but the data stage has {len(inputs)} inputs, counted from 0.")
        folder = inputs[int(number)]
    else:
        folder = user_path(name, base)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise UserError(f"score.model: {folder} has no config.json; name the folder of a transformers checkpoint.")
    return folder


class Score:
    """Scores rows and drops those outside the limits. Raises ``UserError`` for a model that is not there."""

    def __init__(self, config: ScoreStep, context: StepContext) -> None:
        self.config = config
        self.context = context
        self._scorer: RowScorer | None = None

    def _load(self) -> RowScorer:
        config = self.config
        if config.by == "function":
            function: RowScorer = load_object(config.function or "")
            return function
        assert config.model is not None
        folder = model_folder(config.model, self.context.base, self.context.inputs)
        return require_models(self.context.models).make_scorer(config, folder, self.context.device)

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Return ``score`` (N,) float64. Loads the model with the first rows."""
        # The model is loaded late, so a resumed build whose sketches exist loads none.
        if self._scorer is None:
            self._scorer = self._load()
        scores = [float(score) for score in self._scorer(rows)] if rows else []
        if len(scores) != len(rows):
            raise UserError(f"{self.config.function} returned {len(scores)} scores for {len(rows)} rows; one each.")
        return {"score": np.array(scores, dtype=np.float64)}

    def decide(self, table: Table) -> Verdict:
        """Drop rows whose score is too low, too high or not finite; the notes have the scores' quantiles."""
        scores = table.columns["score"]
        keep = self.config.keep
        code = keep_all(len(table))
        finite = np.isfinite(scores)
        # Absolute limits first; quantiles can only narrow them.
        low = np.full(len(table), -np.inf if keep.above is None else keep.above)
        high = np.full(len(table), np.inf if keep.below is None else keep.below)
        notes: dict[str, Any] = {}
        # One group of all rows, or a group per source; quantiles are computed within a group.
        groups = range(len(table.sources)) if keep.per_source else (None,)
        for group in groups:
            rows = table.alive & finite & (True if group is None else table.source == group)
            if not rows.any():
                continue
            name = "all" if group is None else table.sources[group]
            quantiles = np.quantile(scores[rows], [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
            notes[name] = {"quantiles": [round(float(value), 6) for value in quantiles]}
            if keep.quantiles is not None:
                bounds = np.quantile(scores[rows], keep.quantiles)
                low[rows] = np.maximum(low[rows], bounds[0])
                high[rows] = np.minimum(high[rows], bounds[1])
        code[scores < low] = 0
        code[scores > high] = 1
        code[~finite] = 2
        return Verdict(code, [BELOW, ABOVE, NO_SCORE], columns={"score": scores}, notes=notes)
