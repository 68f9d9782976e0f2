"""A number for each row, from a model or a function, and which rows are kept for it.

``reward``: a reward model's score of the reply. ``perplexity``: exp of the mean negative log-likelihood of the reply's
tokens, given the prompt. ``ifd``: instruction-following difficulty (arXiv 2308.12032, eq. 3), the perplexity of the
reply given the prompt over that of the reply alone: near 1 the prompt helps little, and above 1 it misleads.
``function``: one of your own. The number stays in the rows as ``score``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from align.config.base import Config
from align.config.user_paths import user_path
from align.data.rows import Row
from align.data.steps.base import StepConfig, StepContext, Table, Verdict, keep_all
from align.errors import UserError
from align.pipeline.registry import load_object

By = Literal["reward", "perplexity", "ifd", "function"]
BELOW, ABOVE, NO_SCORE = "score too low", "score too high", "no score"


class Keep(Config):
    """Which rows are kept. Quantiles are of all rows, or of each source's with ``per_source``."""

    above: float | None = None
    """Keep scores of at least this."""
    below: float | None = None
    """Keep scores of at most this."""
    quantiles: tuple[float, float] | None = Field(None, strict=False)
    """Keep what lies between two quantiles: [0.5, 1] is the better half, [0.1, 0.9] leaves both ends out."""
    per_source: bool = False
    """Take quantiles within each source, so that no source is lost for the scale of its scores."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.quantiles is not None and not 0 <= self.quantiles[0] < self.quantiles[1] <= 1:
            raise ValueError(f"keep.quantiles are {list(self.quantiles)}; expected two shares like [0.5, 1]")
        if self.above is not None and self.below is not None and self.above > self.below:
            raise ValueError(f"keep.above ({self.above}) is more than keep.below ({self.below}), so nothing is kept")
        return self


class ScoreConfig(StepConfig):
    """What scores rows, and which are kept."""

    type: Literal["score"]
    by: By
    """What the number is."""
    model: str | None = None
    """Folder of the checkpoint that scores (``model/`` of a finished stage, or any transformers folder), or ``input 0``
    for one that the data stage was given."""
    function: str | None = Field(None, pattern=r"^[\w.]+:\w+$")
    """``package.module:function``: takes a list of rows and returns a number for each."""
    keep: Keep = Keep()
    """Which rows are kept; all by default."""
    max_length: int = Field(1024, ge=8)
    """Tokens of prompt and reply that a model reads; a longer row is scored by its beginning."""
    batch_size: int = Field(16, ge=1)
    """Rows of one forward pass."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matrix products."""
    decides: ClassVar[bool] = True
    alone: ClassVar[bool] = True

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.by == "function" and (self.function is None or self.model is not None):
            raise ValueError("score by function needs `function: package.module:name`, and no model")
        if self.by != "function" and (self.model is None or self.function is not None):
            raise ValueError(f"score by {self.by} needs `model:`, the folder of a checkpoint, and no function")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """The function's source, or the digests of the model's files."""
        if self.function is not None:
            from align.config.user_functions import function_identity

            return {"function": function_identity(self.function)}
        assert self.model is not None
        if self.model.startswith("input "):
            return {}  # an input's key is part of the stage's own
        folder = model_folder(self.model, base, ())
        digests = load_object("align.models.files:digests")(folder)
        return {f"model {name}": f"sha256:{digest}" for name, digest in digests.items()}

    def start(self, context: StepContext) -> _Score:
        """The step itself. Raises ``UserError`` for a model that is not there."""
        return _Score(self, context)


class RowScorer(Protocol):
    """Gives each row a number; NaN where there is none."""

    def __call__(self, rows: list[Row]) -> list[float]: ...


def model_folder(name: str, base: Path, inputs: tuple[Path, ...]) -> Path:
    """The transformers folder behind ``model``. Raises ``UserError`` when there is none."""
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


class _Score:
    def __init__(self, config: ScoreConfig, context: StepContext) -> None:
        self.config, self.context = config, context
        self._scorer: RowScorer | None = None

    def _load(self) -> RowScorer:
        config = self.config
        if config.by == "function":
            function: RowScorer = load_object(config.function or "")
            return function
        assert config.model is not None
        folder = model_folder(config.model, self.context.base, self.context.inputs)
        make = load_object("align.models.row_scores:make_scorer")
        made: RowScorer = make(config, folder, self.context.device)
        return made

    def sketch(self, rows: list[Row]) -> dict[str, np.ndarray]:
        if self._scorer is None:
            self._scorer = self._load()
        scores = [float(score) for score in self._scorer(rows)] if rows else []
        if len(scores) != len(rows):
            raise UserError(f"{self.config.function} returned {len(scores)} scores for {len(rows)} rows; one each.")
        return {"score": np.array(scores, dtype=np.float64)}

    def decide(self, table: Table) -> Verdict:
        scores, keep = table.columns["score"], self.config.keep
        code = keep_all(len(table))
        finite = np.isfinite(scores)
        low = np.full(len(table), -np.inf if keep.above is None else keep.above)
        high = np.full(len(table), np.inf if keep.below is None else keep.below)
        notes: dict[str, Any] = {}
        groups = range(len(table.sources)) if keep.per_source else (None,)
        for group in groups:
            mine = table.alive & finite & (True if group is None else table.source == group)
            if not mine.any():
                continue
            found = [float(value) for value in np.quantile(scores[mine], [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])]
            notes["all" if group is None else table.sources[group]] = {"quantiles": [round(v, 6) for v in found]}
            if keep.quantiles is not None:
                ends = np.quantile(scores[mine], keep.quantiles)
                low[mine], high[mine] = np.maximum(low[mine], ends[0]), np.minimum(high[mine], ends[1])
        code[scores < low], code[scores > high] = 0, 1
        code[~finite] = 2
        return Verdict(code, [BELOW, ABOVE, NO_SCORE], columns={"score": scores}, notes=notes)
