"""One optimizer for policy and critic, with separate learning rates."""

from __future__ import annotations

from typing import Any

import torch

from align.config.tuning import LORA_HEAD_RATE
from align.rl.model import PolicyAndReference


def make_optimizer(trainer: Any, model: Any) -> torch.optim.Optimizer:
    """Return the Trainer's optimizer with up to six groups: policy, critic and value head, with and without decay."""
    args = trainer.args
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(args, model)
    decaying = set(trainer.get_decay_parameter_names(model))
    groups = []
    for part, rate in learning_rates(args.config, model).items():
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        named = [(name, parameter) for name, parameter in trained if _part(name) == part]
        for decays in (True, False):
            parameters = [parameter for name, parameter in named if (name in decaying) == decays]
            if not parameters:
                continue
            decay = args.weight_decay if decays else 0.0  # biases and norms do not decay
            group = {"params": parameters, "lr": rate, "weight_decay": decay}
            # Only optimizers like Adam have a single epsilon.
            if part != "policy" and isinstance(options.get("eps"), float):
                group["eps"] = args.critic_adam_epsilon
            groups.append(group)
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    return optimizer


def learning_rates(config: Any, model: PolicyAndReference) -> dict[str, float]:
    """Return the peak rates of ``policy`` and, with a critic, ``critic`` (its trunk) and ``head``."""
    if not hasattr(model, "critic"):
        return {"policy": config.learning_rate}
    critic = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
    head = config.critic_head_learning_rate
    if head is None:
        # A policy with adapters is its own reference. Frozen weights are no sign of adapters, because full tuning may
        # also freeze.
        has_adapters = model.reference is None
        head = critic * (LORA_HEAD_RATE if has_adapters else 1.0)
    return {"policy": config.learning_rate, "critic": critic, "head": head}


def _part(name: str) -> str:
    return "head" if name.startswith("critic.head.") else name.split(".")[0]
