"""``python -m tests.support.training.sft_run FOLDER MODEL``: SFT with a checkpoint at every step, to be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from align.pipeline.registry import STAGES
from tests.support.training.training_stages import FULL, make_stage

if __name__ == "__main__":
    STAGES["sft"].runner()(make_stage("sft", Path(sys.argv[1]), Path(sys.argv[2]), FULL, save_steps=1))
