"""SimPO (arXiv 2405.14734): preference optimization per token, without a reference and towards a margin.

Stage ``cpo`` with ``loss: simpo`` and the paper's scale of beta. Experimental in trl, whose CPOTrainer it runs on.
"""

from __future__ import annotations

from align.stages import cpo

run = cpo.run
