"""How weights are fitted: one block, ``tuning: {method: lora, rank: 16}``, for every stage that trains. Torch-free.

``full`` trains the model's own weights; every other method trains few weights beside frozen ones. What the methods do
to a model stands in ``align.models.tuning``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from align.stage import Config

LORA_HEAD_RATE = 0.1
"""Learning rate of a score or value head, as a share of the adapters' beside it. A step of Adam moves every weight of a
head by about the learning rate, and a score by that times the hidden size and the features' size: 1e-3, right for
adapters, moves SmolLM2's scores by about 1.
"""

Targets = Literal["all-linear"] | list[str]


class TuningBase(Config):
    """What every method can tell of itself."""

    method: str
    input_only: ClassVar[bool] = False
    """Whether the method acts on the model's input or keys and values as a whole (virtual tokens), not on modules."""

    @property
    def trains_all(self) -> bool:
        """Whether the model's own weights are trained, so that a reference needs a copy of them."""
        return self.method == "full"

    @property
    def label(self) -> str:
        """Short name for tables: ``lora r16``."""
        return self.method


class FullTuning(TuningBase):
    """Train the model's own weights."""

    method: Literal["full"] = "full"


class LoraTuning(TuningBase):
    """Train low-rank adapters beside frozen weights (arXiv 2106.09685)."""

    method: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024)
    """Rank of each update; more rank, more capacity and memory."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / rank; raising it acts like a higher learning rate."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input; keep 0 for PPO and DPO, whose ratios assume a deterministic model."""
    targets: Targets = "all-linear"
    """Module names that get an adapter; ``all-linear`` leaves out only the output head."""

    @property
    def label(self) -> str:
        """With its rank."""
        return f"{self.method} r{self.rank}"


Tuning = Annotated[FullTuning | LoraTuning, Field(discriminator="method")]
"""How weights are fitted. ``tuning: {method: lora, rank: 16}``"""
