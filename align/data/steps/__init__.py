"""Every step a recipe may have, one file each. ``Step`` is any of their settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from align.data.steps.cap import CapConfig
from align.data.steps.decontaminate import Decontaminate
from align.data.steps.divide import DivideStep
from align.data.steps.exact_duplicates import ExactDuplicates
from align.data.steps.filter import FilterStep
from align.data.steps.mix import MixConfig
from align.data.steps.near_duplicates import NearDuplicates
from align.data.steps.normalize import NormalizeStep
from align.data.steps.pairs import PairsStep
from align.data.steps.score import ScoreConfig
from align.data.steps.semantic_duplicates import SemanticDuplicates

Step = Annotated[
    NormalizeStep
    | FilterStep
    | DivideStep
    | PairsStep
    | ScoreConfig
    | ExactDuplicates
    | NearDuplicates
    | SemanticDuplicates
    | Decontaminate
    | CapConfig
    | MixConfig,
    Field(discriminator="type"),
]
