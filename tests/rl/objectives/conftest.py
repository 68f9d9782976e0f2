"""Trainers without a critic on the tiny model, ready for a few updates."""

from __future__ import annotations

import pytest
import torch

from align.config.tuning import FullTuning
from align.models.loading import load_policy, load_tokenizer
from tests.support.rl.arguments import settings
from tests.support.rl.trainers import METHODS, ROWS, make_engine, options_in, share_of_vowels

PASSED = ("eval_dataset", "ptx_dataset", "notify", "callbacks", "gold")


@pytest.fixture
def make_online(tiny_model, tmp_path):
    """``make_online(method, tuning=..., rows=..., scorer=..., engine=..., **fields of its config) -> trainer``."""

    def make(method, tuning=None, rows=ROWS, scorer=share_of_vowels, engine=None, **fields):
        trainer, config = METHODS[method]
        others = {name: fields.pop(name) for name in PASSED if name in fields}
        options = options_in(tmp_path) | {"samples_per_prompt": 4, "per_device_train_batch_size": 2}
        if method == "rejection":
            # The tiny model hardly ever ends; and the stage has more steps in a round.
            options |= {"truncated": "learn", "num_mini_batches": 1}
        torch.manual_seed(0)
        return trainer(
            model=load_policy(tiny_model),
            **settings(config, **(options | fields | {"tuning": tuning or FullTuning()})),
            train_dataset=rows,
            processing_class=load_tokenizer(tiny_model),
            scorer=scorer,
            engine=engine or make_engine(tiny_model),
            **others,
        )

    return make
