"""Layers below the first adapter are passed once for policy, reference and critic, and no number changes."""

from __future__ import annotations

import pytest

from align.config.tuning import LoraTuning
from align.models.fast import shared_parts as shared_layers
from align.rl.model import trunk_of
from tests.support.rl.gradients import TEXTS

LAST = LoraTuning(rank=4, last_layers=1)


def counting(calls, number):
    """A hook that counts a layer's passes in ``calls[number]``."""

    def hook(*_):
        calls[number] += 1

    return hook


# In an update two micro-batches are measured by policy, reference and critic, and learned from twice by policy and
# critic: 14 passes. What is below the adapters is passed once where all have its weights, twice where the critic has
# others.
@pytest.mark.parametrize(
    ("changed", "highest", "shared", "apart"),
    [
        ({}, 14, 2 + 4, 4 + 8),
        ({"padding_free": False}, 14, 2 + 4, 4 + 8),
        ({"reuse_forward": 1.0}, 6 + 4, 2 + 2, 4 + 4),  # the first epoch learns from the measuring passes
        ({"ptx_coef": 0.5}, 14, 2 + 8, 4 + 8),  # the critic's pass has no texts in it, and so other tokens
    ],
    ids=["ragged", "padded", "kept", "ptx"],
)
@pytest.mark.parametrize("reward", [False, True], ids=["critic_of_policy", "critic_of_reward"])
def test_frozen_layers_run_once_and_change_no_number(
    make_trainer, monkeypatch, changed, highest, shared, apart, reward
):
    if "ptx_coef" in changed:
        changed = changed | {"ptx_rows": 4, "ptx_dataset": TEXTS}
    weights, passes = [], []
    for split in (shared_layers.SPLITTABLE, ()):
        monkeypatch.setattr(shared_layers, "SPLITTABLE", split)
        trainer = make_trainer(tuning=LAST, reward=reward, updates=2, num_epochs=2, learning_rate=1e-2, **changed)
        calls = [0, 0]
        for trunk in (trunk_of(trainer.model.policy), trainer.model.critic.trunk):
            for number, layer in enumerate(trunk.layers):
                layer.register_forward_hook(counting(calls, number))
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
        passes.append(calls)
    assert len(weights[0]) > 10
    assert all(weights[1][name].equal(tensor) for name, tensor in weights[0].items())
    assert passes == [[2 * (apart if reward else shared), 2 * highest], [2 * highest, 2 * highest]]
