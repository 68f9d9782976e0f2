"""One optimizer over two parts, policy and critic: learning rates and gradient clipping of their own."""

from __future__ import annotations

from typing import Any

import torch

from align.config.tuning import LORA_HEAD_RATE
from align.rl.model import PolicyAndReference

PARTS = ("policy", "critic")


def make_optimizer(trainer: Any, model: Any) -> torch.optim.Optimizer:
    """The Trainer's optimizer class with up to six groups: policy, critic and value head, with and without decay."""
    args = trainer.args
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(args, model)
    decaying = set(trainer.get_decay_parameter_names(model))
    groups = []
    for part, rate in learning_rates(args, model).items():
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and _part(name) == part]
        for decays in (True, False):
            chosen = [p for name, p in named if (name in decaying) == decays]
            decay = args.weight_decay if decays else 0.0
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
                if part != "policy" and isinstance(options.get("eps"), float):
                    groups[-1]["eps"] = args.critic_adam_epsilon
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    return optimizer


def learning_rates(args: Any, model: PolicyAndReference) -> dict[str, float]:
    """Peak rates of ``policy`` and, where there is one, ``critic`` (its trunk) and ``head`` (its values)."""
    if not hasattr(model, "critic"):
        return {"policy": args.learning_rate}
    critic = args.learning_rate if args.critic_learning_rate is None else args.critic_learning_rate
    head = args.critic_head_learning_rate
    if head is None:
        adapters = any(not p.requires_grad for p in model.policy.parameters())
        head = critic * (LORA_HEAD_RATE if adapters else 1.0)
    return {"policy": args.learning_rate, "critic": critic, "head": head}


def _part(name: str) -> str:
    return "head" if name.startswith("critic.head.") else name.split(".")[0]


def clip_by_part(model: PolicyAndReference, max_norm: float) -> dict[str, torch.Tensor]:
    """Scale each part's gradients down to ``max_norm``; returns the norms before, 0 without gradients."""
    norms = {}
    for part in (part for part in PARTS if hasattr(model, part)):
        parameters = [p for p in getattr(model, part).parameters() if p.grad is not None]
        norms[part] = torch.nn.utils.clip_grad_norm_(parameters, max_norm) if parameters else torch.zeros(())
    return norms
