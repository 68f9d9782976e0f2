"""One optimizer over two parts, policy and critic: learning rates and gradient clipping of their own."""

from __future__ import annotations

from typing import Any

import torch

from align.ppo.model import PolicyAndCritic

PARTS = ("policy", "critic")


def make_optimizer(trainer: Any, model: Any) -> torch.optim.Optimizer:
    """The Trainer's optimizer class with up to four groups: each part's weights with and without weight decay."""
    args = trainer.args
    decaying = set(trainer.get_decay_parameter_names(model))
    rates = {"policy": args.learning_rate, "critic": args.critic_learning_rate}
    rates["critic"] = args.learning_rate if rates["critic"] is None else rates["critic"]
    groups = []
    for part in PARTS:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name.split(".")[0] == part]
        for decays in (True, False):
            chosen = [p for name, p in named if (name in decaying) == decays]
            decay = args.weight_decay if decays else 0.0
            if chosen:
                groups.append({"params": chosen, "lr": rates[part], "weight_decay": decay})
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    return optimizer


def clip_by_part(model: PolicyAndCritic, max_norm: float) -> dict[str, torch.Tensor]:
    """Scale each part's gradients down to ``max_norm``; returns the norms before, 0 without gradients."""
    norms = {}
    for part in PARTS:
        parameters = [p for p in getattr(model, part).parameters() if p.grad is not None]
        norms[part] = torch.nn.utils.clip_grad_norm_(parameters, max_norm) if parameters else torch.zeros(())
    return norms
