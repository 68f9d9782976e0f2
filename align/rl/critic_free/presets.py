"""What the names of GRPO's variants stand for. Torch-free.

Each field can be set by itself; a preset only says what it is when it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GroupLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
Scale = Literal["group", "batch", "none"]
Ratio = Literal["token", "sequence"]


@dataclass(frozen=True)
class Preset:
    """A variant in words of the objective.

    ``ratio`` is one probability ratio per token, or one per response (the geometric mean of its tokens');
    ``aggregation`` as for PPO; ``clips`` says whether the surrogate is clipped (PPO's) or only its weight capped.
    """

    aggregation: Literal["token", "sequence", "constant"]
    scale_rewards: Scale = "group"
    clip_range: float = 0.2
    clip_range_high: float | None = None
    ratio: Ratio = "token"
    clips: bool = True


PRESETS: dict[GroupLoss, Preset] = {
    "grpo": Preset("sequence"),
    "bnpo": Preset("token"),
    "dr_grpo": Preset("constant", scale_rewards="none"),
    "dapo": Preset("token", clip_range_high=0.28),
    "gspo": Preset("sequence", clip_range=3e-4, clip_range_high=4e-4, ratio="sequence"),
    "cispo": Preset("token", clip_range_high=4.0, clips=False),
}
"""``grpo``: arXiv 2402.03300, every response weighs the same. ``bnpo``: every token of the optimizer step does.
``dr_grpo``: 2503.20783, token sums over ``max_tokens``, scores not divided by their spread. ``dapo``: 2503.14476, every
token weighs the same and rises may go further than falls. ``gspo``: 2507.18071, one ratio per response, with clip
ranges of its own size. ``cispo``: 2506.13585, the ratio is a weight that is capped and has no gradient; its cap is
1 + ``clip_range_high``."""
