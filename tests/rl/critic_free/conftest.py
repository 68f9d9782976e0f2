"""Trainers without a critic on the tiny model, ready for a few updates."""

from __future__ import annotations

import pytest
import torch

from align.models.loading import load_policy, load_tokenizer
from align.rl import (
    BestOfNConfig,
    BestOfNTrainer,
    GRPOConfig,
    GRPOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from tests.rl.conftest import ROWS, make_engine, one_thread, options_in, share_of_vowels

__all__ = ["one_thread"]  # a fixture: bit-for-bit comparisons need a fixed thread count

METHODS = {
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
    "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig),
    "rejection": (BestOfNTrainer, BestOfNConfig),
}
PASSED = ("eval_dataset", "ptx_dataset", "notify", "callbacks", "gold")


@pytest.fixture
def make_online(tiny_model, tmp_path):
    """``make_online(method, tuning=..., rows=..., scorer=..., engine=..., **fields of its config) -> trainer``."""

    def make(method, tuning=None, rows=ROWS, scorer=share_of_vowels, engine=None, **fields):
        trainer, config = METHODS[method]
        others = {name: fields.pop(name) for name in PASSED if name in fields}
        options = options_in(tmp_path) | {"samples_per_prompt": 4, "per_device_train_batch_size": 2}
        if method == "rejection":
            options |= {"truncated": "learn"}  # the tiny model hardly ever ends
        torch.manual_seed(0)
        return trainer(
            model=load_policy(tiny_model),
            args=config(**(options | fields)),
            train_dataset=rows,
            processing_class=load_tokenizer(tiny_model),
            scorer=scorer,
            engine=engine or make_engine(tiny_model),
            tuning=tuning,
            **others,
        )

    return make


def updates(trainer):
    return [entry for entry in trainer.state.log_history if "score" in entry]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
