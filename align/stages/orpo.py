"""Stage ``orpo``: odds-ratio preference optimization (arXiv 2403.07691), SFT and preferences in one loss.

Experimental in trl, which may move or drop its ORPOTrainer.
"""

from __future__ import annotations

import functools
from typing import Any

from align.config.stages.orpo import OrpoConfig
from align.pipeline.context import StageContext
from align.stages.preference import train_without_reference


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, accuracy and margin.

    Raises ``UserError`` for a model without chat template, data without usable pairs, or a trl without ORPOTrainer.
    """
    from align.training.orpo_trainer import Arguments, PreparedORPO

    config: OrpoConfig = context.config
    trainer_class = functools.partial(PreparedORPO, prompt_too=config.prompt_loss)
    return train_without_reference(context, trainer_class, Arguments, beta=config.beta)
