"""Gradients of optimizer steps, and those of supervised texts."""

from __future__ import annotations

import torch
from transformers import TrainerCallback


class FlatGradients(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


TEXTS = [
    {
        "prompt": [{"role": "user", "content": f"repeat {'xy' * i}"}],
        "completion": [{"role": "assistant", "content": "xy" * (i + 1)}],
    }
    for i in range(5)
]


class Gradients(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def sft_gradient(policy, texts):
    """Backward pass of SFT's loss, transformers' own, on the answers of (prompt, answer) texts."""
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids, labels = torch.zeros((len(texts), width), dtype=torch.long), torch.full((len(texts), width), -100)
    for row, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
    loss = policy(input_ids=ids, labels=labels).loss
    loss.backward()
    return loss.item()
