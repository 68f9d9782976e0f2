"""Which of a model's own weights are open at which step, where not all are at every one. Torch-free.

What closes and opens them is ``align.training.unfreezing``'s.
"""

from __future__ import annotations

import itertools
from typing import Literal

from pydantic import Field, field_serializer, model_validator

from align.config.base import Config


class Unfreeze(Config):
    """Open the model from its last layers down while it is trained (gradual unfreezing, arXiv 1801.06146).

    A layer that is closed gets no gradient and no optimizer state. The last norm is open from the start.
    """

    at: dict[float, int] = Field(min_length=1)
    """When -> how many of the last layers are open from then on: ``{0: 2, 50: 8}``. More than there are means all."""
    unit: Literal["steps", "epochs"] = "steps"
    """What the left side counts: optimizer steps, or epochs (a fraction is a part of one)."""
    embeddings: bool = False
    """Open the embeddings too, from when every layer is open; a model that ties its head to them opens both."""
    head: bool = False
    """Open the vocabulary head from the start; with tied embeddings these too. A reward model's is always open."""

    @model_validator(mode="after")
    def _opens_more_and_more(self) -> Unfreeze:
        times = sorted(self.at)
        if times[0] != 0:
            raise ValueError(
                f"at starts at {times[0]:g}: nothing would be trained before. Give `0:` a number of layers."
            )
        if self.unit == "steps" and any(time != int(time) for time in times):
            raise ValueError(f"at counts steps, whole numbers; found {', '.join(f'{t:g}' for t in times)}.")
        opened = [self.at[time] for time in times]
        if opened[0] < 0 or any(later <= earlier for earlier, later in itertools.pairwise(opened)):
            raise ValueError(f"at opens {opened} layers one after another; each must be more than the one before.")
        return self

    @field_serializer("at")
    def _in_order_with_text_keys(self, at: dict[float, int]) -> dict[str, int]:
        return {str(int(time) if time == int(time) else time): at[time] for time in sorted(at)}


class Lisa(Config):
    """Train a few layers drawn at random, others after some steps (LISA, arXiv 2403.17919)."""

    layers: int = Field(2, ge=1)
    """Layers open at once; optimizer state and gradients exist for these only."""
    every: int = Field(20, ge=1)
    """Optimizer steps until others are drawn; AdamW's averages of a layer that closes are lost."""
    embeddings: bool = True
    """Train the embeddings all along, as the paper does."""
    head: bool = True
    """Train the vocabulary head all along, as the paper does; tied to the embeddings it is open if either is."""
