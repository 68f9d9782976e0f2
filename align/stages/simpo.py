"""Stage ``simpo``: SimPO (arXiv 2405.14734), a loss per token with a target margin and no reference.

It is stage ``cpo`` with ``loss: simpo`` and the paper's scale of beta. trl's CPOTrainer is experimental.
"""

from __future__ import annotations

from align.stages import cpo

run = cpo.run
