"""A trainer on the tiny model, ready for a few updates."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging

from align.inference.transformers import TransformersEngine
from align.models.loading import load_policy, load_reward, load_tokenizer
from align.rl import PPOConfig, PPOTrainer

PASSED = ("critic", "eval_dataset", "ptx_dataset", "notify")
"""Arguments of ``PPOTrainer`` that are no fields of its config."""
ROWS = [{"id": str(i), "prompt": [{"role": "user", "content": f"say {'abc' * i}"}]} for i in range(8)]


def share_of_vowels(rows, responses):
    """Share of a response's bytes that are vowels."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in responses]


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-for-bit comparisons need a fixed thread count, and the tiny model is fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


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


@pytest.fixture
def make_trainer(tiny_model, tiny_reward, tmp_path):
    """``make_trainer(tuning=..., reward=True, engine=..., **PPOConfig fields) -> PPOTrainer``."""

    def make(
        tuning=None, reward=False, scorer=share_of_vowels, engine=None, callbacks=None, rows=ROWS, gold=None, **fields
    ):
        others = {name: fields.pop(name) for name in PASSED if name in fields}
        options = options_in(tmp_path) | {"samples_per_prompt": 2, "per_device_train_batch_size": 4}
        torch.manual_seed(0)
        return PPOTrainer(
            model=load_policy(tiny_model),
            args=PPOConfig(**(options | fields)),
            train_dataset=rows,
            processing_class=load_tokenizer(tiny_model),
            scorer=scorer,
            engine=engine or make_engine(tiny_model),
            reward_model=load_reward(tiny_reward) if reward else None,
            gold=gold,
            tuning=tuning,
            callbacks=callbacks,
            **others,
        )

    return make


def make_engine(model_dir):
    return TransformersEngine(model_dir, device=torch.device("cpu"), dtype=torch.float32, batch_size=64)
