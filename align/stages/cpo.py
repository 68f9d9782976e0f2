"""Stage ``cpo``: contrastive preference optimization (arXiv 2401.08417) and other losses without a reference.

Experimental in trl, which may move or drop its CPOTrainer.
"""

from __future__ import annotations

from typing import Any

from align.config.stages.cpo import CpoConfig
from align.pipeline.context import StageContext
from align.stages.preference import train_without_reference


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, accuracy and margin.

    Raises ``UserError`` for a model without chat template, data without usable pairs, or a trl without CPOTrainer.
    """
    from align.training.cpo_trainer import Arguments, PreparedCPO

    config: CpoConfig = context.config
    return train_without_reference(
        context,
        PreparedCPO,
        Arguments,
        beta=config.beta,
        loss_type=config.loss,
        label_smoothing=config.label_smoothing,
        cpo_alpha=config.sft_weight,
        simpo_gamma=0.5 if config.simpo_gamma is None else config.simpo_gamma,
        alpha=config.alpha,
    )
