"""A trainer on the tiny model, ready for a few updates."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging

from align.config.tuning import FullTuning
from align.models.loading import load_reward, load_tokenizer
from align.models.tuning.apply import load_for_tuning
from align.rl import PpoConfig, PPOTrainer
from tests.support.rl.arguments import settings
from tests.support.rl.trainers import ROWS, make_engine, options_in, share_of_vowels

PASSED = ("episodes", "eval_dataset", "ptx_dataset", "notify")
"""Arguments of ``PPOTrainer`` that are no fields of its config."""


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-for-bit comparisons need a fixed thread count, and the tiny model is fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_trainer(tiny_model, tiny_reward, tmp_path):
    """``make_trainer(tuning=..., reward=True, engine=..., **PpoConfig fields) -> PPOTrainer``."""

    def make(
        tuning=None, reward=False, scorer=share_of_vowels, engine=None, callbacks=None, rows=ROWS, gold=None, **fields
    ):
        others = {name: fields.pop(name) for name in PASSED if name in fields}
        is_narrow = (others | fields).get("bf16", False)
        options = options_in(tmp_path) | {"samples_per_prompt": 2, "per_device_train_batch_size": 4}
        torch.manual_seed(0)
        return PPOTrainer(
            model=load_for_tuning(tiny_model, tuning or FullTuning(), "bfloat16" if is_narrow else "float32"),
            **settings(PpoConfig, **(options | fields | {"tuning": tuning or FullTuning()})),
            train_dataset=rows,
            processing_class=load_tokenizer(tiny_model),
            scorer=scorer,
            engine=engine or make_engine(tiny_model),
            reward_model=load_reward(tiny_reward) if reward else None,
            gold=gold,
            callbacks=callbacks,
            **others,
        )

    return make
