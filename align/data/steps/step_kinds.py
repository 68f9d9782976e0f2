"""Registry of steps: the code that a step's settings configure, and how it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align.config.base import Config
from align.config.recipe.filter_settings import FilterStep
from align.config.recipe.step_settings import (
    CapStep,
    DecontaminateStep,
    DivideStep,
    ExactDuplicatesStep,
    MixStep,
    NearDuplicatesStep,
    NormalizeStep,
    PairsStep,
    ScoreStep,
    SemanticDuplicatesStep,
)
from align.data.steps.base import StepContext
from align.data.steps.decontaminate import Decontaminate
from align.data.steps.deduplicate import ExactDuplicates, NearDuplicates, SemanticDuplicates
from align.data.steps.filter import Filter
from align.data.steps.mix import Cap, Mix
from align.data.steps.normalize import Normalize
from align.data.steps.pairs import Pairs
from align.data.steps.score import Score
from align.data.steps.split import (
    Divide,
    Identical,
    IdenticalStep,
    MaxRows,
    MaxRowsStep,
    Split,
    SplitStep,
    Usable,
    UsableStep,
)


@dataclass(frozen=True)
class StepKind:
    """One kind of step."""

    start: Callable[[Any, StepContext], Any]
    """Makes the ``RowStep`` or ``TableStep`` from its settings. Loads models and tokenizers, and raises ``UserError``
    for one that is not there."""
    needs_all_rows: bool = False
    """True for a ``TableStep``, which decides over the sketches of all rows."""
    runs_model: bool = False
    """True for a step that uses all cores or a GPU, and so must not run in several processes at once."""


STEPS: dict[type[Config], StepKind] = {
    NormalizeStep: StepKind(Normalize),
    FilterStep: StepKind(Filter),
    DivideStep: StepKind(Divide),
    PairsStep: StepKind(Pairs),
    ScoreStep: StepKind(Score, needs_all_rows=True, runs_model=True),
    ExactDuplicatesStep: StepKind(ExactDuplicates, needs_all_rows=True),
    NearDuplicatesStep: StepKind(NearDuplicates, needs_all_rows=True),
    SemanticDuplicatesStep: StepKind(SemanticDuplicates, needs_all_rows=True, runs_model=True),
    DecontaminateStep: StepKind(Decontaminate, needs_all_rows=True),
    CapStep: StepKind(Cap, needs_all_rows=True),
    MixStep: StepKind(Mix, needs_all_rows=True),
    # Not written in recipes: every build ends with these.
    UsableStep: StepKind(Usable),
    IdenticalStep: StepKind(Identical, needs_all_rows=True),
    MaxRowsStep: StepKind(MaxRows, needs_all_rows=True),
    SplitStep: StepKind(Split, needs_all_rows=True),
}


def start_step(config: Config, context: StepContext) -> Any:
    """Return the step that ``config`` describes. Raises ``UserError`` if it cannot run."""
    return STEPS[type(config)].start(config, context)
