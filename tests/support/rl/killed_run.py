"""Updates on the tiny model from the last checkpoint; ``test_sigkill.py`` and ``vllm_killed_run.py`` kill them.

``python -m tests.support.rl.killed_run POLICY REWARD FOLDER`` runs it with the transformers sampler.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from align.config.tuning import LoraTuning
from align.models.loading import load_policy, load_reward, load_tokenizer
from align.rl import PpoConfig, PPOTrainer
from align.rl.checkpoint import last_checkpoint
from tests.support.rl.arguments import settings
from tests.support.rl.trainers import ROWS, make_engine, share_of_vowels

TIMED = ("seconds", "per_second", "peak_memory", "runtime")
HELD_OUT = [{"id": f"h{i}", "prompt": f"tell {'z' * i}"} for i in range(3)]


class Lives(TrainerCallback):
    """Leaves a file when training starts, so that a kill hits the run and not its imports. May die at a step."""

    def __init__(self, marker: Path, dies_at: int) -> None:
        self.marker, self.left = marker, dies_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.marker.write_text("begun")

    def on_step_begin(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


FIELDS: dict[str, Any] = {
    "tuning": LoraTuning(rank=4, alpha=8),
    "rollout_batch": 16,
    "samples_per_prompt": 4,
    "max_tokens": 12,
    "num_epochs": 2,
    "num_mini_batches": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "normalize_scores": True,
    "kl_controller": "adaptive",
    "kl_target": 0.5,
    "kl_horizon": 200,
    "eval_updates": 5,
    "keep": "best",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "probe_parity": False,
    "seed": 3,
}


def main(policy: Path, reward: Path, folder: Path, updates: int = 80, engine: Any = None, dies_at: int = 0) -> None:
    """Train to the end, or to this life's ``dies_at``-th optimizer step; leave metrics and weights in ``folder``."""
    torch.set_num_threads(1)
    trainer = PPOTrainer(
        model=load_policy(policy),
        **settings(PpoConfig, output_dir=str(folder / "run"), updates=updates, **FIELDS),
        train_dataset=ROWS,
        processing_class=load_tokenizer(policy),
        scorer=share_of_vowels,
        engine=engine or make_engine(policy),
        reward_model=load_reward(reward),
        eval_dataset=HELD_OUT,
        callbacks=[Lives(folder / "begun", dies_at)],
    )
    checkpoint = last_checkpoint(folder / "run")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(weights, folder / "weights.safetensors")
    history = [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMED)}
        for entry in trainer.state.log_history
        if "score" in entry or "eval_score" in entry
    ]
    (folder / "done.json").write_text(json.dumps({"history": history, "best": trainer.validation.best}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
