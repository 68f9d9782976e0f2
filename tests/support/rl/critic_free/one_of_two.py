"""What each process of ``test_distributed.py`` runs: two updates of a method; rank 0 writes what came out.

``python -m tests.support.rl.critic_free.one_of_two MODEL OUT METHOD``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.rl.critic_free.conftest import METHODS
from tests.support.rl.one_of_two import two_updates

FIELDS: dict[str, dict[str, Any]] = {
    "grpo": {"scale_rewards": "batch", "truncated": "mask", "kl_coef": 0.5},
    "rloo": {"whiten_advantages": True, "normalize_scores": True},
    "online_dpo": {},
    "rejection": {"best": 2, "truncated": "learn"},
}

if __name__ == "__main__":
    model_dir, out, method = sys.argv[1:]
    batch = {"rollout_batch": 16, "samples_per_prompt": 4}
    two_updates(*METHODS[method], Path(model_dir), Path(out), batch | FIELDS[method])
