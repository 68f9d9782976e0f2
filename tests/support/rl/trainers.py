"""Parts of small trainers: rows, a scorer, an engine, and the fields of a short run."""

from __future__ import annotations

import torch

from align.inference.transformers import TransformersEngine
from align.rl import (
    BestOfNTrainer,
    GrpoConfig,
    GRPOTrainer,
    OnlineDpoConfig,
    OnlineDPOTrainer,
    RejectionConfig,
    RlooConfig,
    RLOOTrainer,
)

ROWS = [{"id": str(i), "prompt": [{"role": "user", "content": f"say {'abc' * i}"}]} for i in range(8)]


def share_of_vowels(rows, responses):
    """Share of a response's bytes that are vowels."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in responses]


def options_in(folder):
    """Fields of a trainer's config for two updates of eight responses, without anything written but the run's own."""
    return {
        "output_dir": str(folder / "run"),
        "updates": 2,
        "rollout_batch": 8,
        "max_tokens": 6,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "probe_parity": False,
        "seed": 3,
    }


def make_engine(model_dir):
    return TransformersEngine(model_dir, device=torch.device("cpu"), dtype=torch.float32, batch_size=64)


METHODS = {
    "grpo": (GRPOTrainer, GrpoConfig),
    "rloo": (RLOOTrainer, RlooConfig),
    "online_dpo": (OnlineDPOTrainer, OnlineDpoConfig),
    "rejection": (BestOfNTrainer, RejectionConfig),
}


def updates(trainer):
    return [entry for entry in trainer.state.log_history if "score" in entry]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class Fixed:
    def __init__(self, *values):
        self.values = list(values)

    def score(self, rows, responses, truncated=None):
        return self.values
