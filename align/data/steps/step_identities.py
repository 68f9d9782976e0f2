"""Digests of everything that a step reads besides rows. A plan imports only the steps of its recipe."""

from __future__ import annotations

from pathlib import Path

from align.config.base import Config
from align.config.recipe.filter_settings import FilterStep
from align.config.recipe.step_settings import DecontaminateStep, NormalizeStep, ScoreStep, SemanticDuplicatesStep
from align.data.steps.base import ModelLoaders
from align.pipeline.registry import load_object

_FUNCTIONS: dict[type[Config], str] = {
    NormalizeStep: "align.data.steps.normalize:normalize_identities",
    FilterStep: "align.data.steps.filter:filter_identities",
    ScoreStep: "align.data.steps.score:scorer_identities",
    SemanticDuplicatesStep: "align.data.steps.deduplicate:embedder_identities",
    DecontaminateStep: "align.data.steps.decontaminate:evaluation_set_identities",
}
"""Import paths, so a plan imports no other steps than its recipe's. The other steps read only the rows.
"""


def step_identities(config: Config, base: Path, models: ModelLoaders | None = None) -> dict[str, str]:
    """Return digests and versions of everything except the rows that the step reads.

    Raises ``UserError`` for a missing file.
    """
    function = _FUNCTIONS.get(type(config))
    identities: dict[str, str] = {} if function is None else load_object(function)(config, base, models)
    return identities
