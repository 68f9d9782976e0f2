"""Every step a recipe may have, one file each. ``Step`` is any of their settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from align.data.steps.cap import CapConfig
from align.data.steps.mix import MixConfig
from align.data.steps.score import ScoreConfig

Step = Annotated[CapConfig | MixConfig | ScoreConfig, Field(discriminator="type")]
