"""What each process of ``test_distributed.py`` runs: two updates of a method; rank 0 writes what came out.

``python -m tests.support.rl.objectives.distributed_run MODEL OUT METHOD``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.support.rl.distributed_run import two_updates
from tests.support.rl.trainers import METHODS

FIELDS: dict[str, dict[str, Any]] = {
    "grpo": {"scale_rewards": "batch", "truncated": "mask", "kl_coef": 0.5},
    "rloo": {"whiten_advantages": True, "normalize_scores": True},
    "online_dpo": {},
    "rejection": {"best": 2, "truncated": "learn", "num_mini_batches": 1},
}

if __name__ == "__main__":
    model_dir, out, method = sys.argv[1:]
    batch = {"rollout_batch": 16, "samples_per_prompt": 4}
    two_updates(*METHODS[method], Path(model_dir), Path(out), batch | FIELDS[method])
