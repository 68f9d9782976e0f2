"""Parts of small trainers: rows, a scorer, an engine, and the fields of a short run."""

from __future__ import annotations

import torch

from align.config.tuning import LoraTuning
from align.inference.transformers import TransformersEngine
from align.models.loading import load_policy
from align.rl import (
    BestOfNTrainer,
    GrpoConfig,
    GRPOTrainer,
    OnlineDpoConfig,
    OnlineDPOTrainer,
    PpoConfig,
    PPOTrainer,
    RejectionConfig,
    RlooConfig,
    RLOOTrainer,
)
from align.scoring.scored import Scored, Scorer
from tests.support.rl.arguments import settings

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


EPISODE_METHODS = {"ppo": (PPOTrainer, PpoConfig), "grpo": (GRPOTrainer, GrpoConfig)}


def make_episode_trainer(model_dir, kind, player, rows, folder, **fields):
    """Return a trainer of a few episodes an update, with LoRA on the model in ``model_dir``."""
    trainer_class, config_class = EPISODE_METHODS[kind]
    options = options_in(folder) | {"rollout_batch": 16, "samples_per_prompt": 4}
    options |= {"per_device_train_batch_size": 4, "tuning": LoraTuning(rank=4, alpha=8)}
    torch.manual_seed(0)
    return trainer_class(
        model=load_policy(model_dir),
        **settings(config_class, **(options | fields)),
        train_dataset=rows,
        processing_class=player.tokenizer,
        scorer=None,
        engine=make_engine(model_dir),
        episodes=player,
    )


def rollouts_of(trainer):
    """Train, and return the rollouts that were learned from."""
    rollouts = []
    compute = trainer.compute_advantages
    trainer.compute_advantages = lambda rollout: rollouts.append(rollout) or compute(rollout)
    trainer.train()
    return rollouts


def updates(trainer):
    return [entry for entry in trainer.state.log_history if "score" in entry]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class Fixed(Scorer):
    def __init__(self, *values):
        self.values = list(values)

    def score(self, rows, responses, truncated=None):
        return Scored(self.values)
