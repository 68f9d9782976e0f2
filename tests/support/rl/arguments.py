"""Arguments of trainers from one dict of fields, also with values that no user may give."""

from __future__ import annotations

from typing import Any

from align.config.stages.rl import RolloutFields

RENAMED = {"per_device_train_batch_size": "micro_batch_size"}


def settings(config_class: type[RolloutFields], **fields: Any) -> dict[str, Any]:
    """Return ``config`` and ``options`` of a trainer: the fields of the config, and the others."""
    renamed = {RENAMED.get(name, name): value for name, value in fields.items()}
    config = {name: renamed.pop(name) for name in list(renamed) if name in config_class.model_fields}
    return {"config": unbounded(config_class, **config), "options": renamed}


def unbounded(config_class: type[RolloutFields], **fields: Any) -> RolloutFields:
    """Return a config whose values that are refused are set after its check.

    They are a rate or a norm of 0, and a warm-up of the critic during all updates.
    """
    refused = {name: fields[name] for name in ("learning_rate", "max_grad_norm") if fields.get(name) == 0.0}
    accepted: dict[str, Any] = dict.fromkeys(refused, 1.0)
    warmup = fields.get("critic_warmup_updates", 0)
    if warmup >= fields.get("updates", 100):
        refused["critic_warmup_updates"] = warmup
        accepted["critic_warmup_updates"] = 0
    return config_class.for_trainer(**(fields | accepted)).model_copy(update=refused)
