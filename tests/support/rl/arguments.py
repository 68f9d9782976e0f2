"""Arguments of trainers with values that no user may give, for tests that isolate a part of an update."""

from __future__ import annotations

from typing import Any, TypeVar

from align.rl.arguments import RolloutArguments

Arguments = TypeVar("Arguments", bound=RolloutArguments)


def unbounded(config: type[Arguments], **fields: Any) -> Arguments:
    """Return arguments whose values that the settings refuse are set after their check.

    They are a rate or a norm of 0, and a warm-up of the critic that takes all updates.
    """
    refused = {name: fields[name] for name in ("learning_rate", "max_grad_norm") if fields.get(name) == 0.0}
    accepted: dict[str, Any] = dict.fromkeys(refused, 1.0)
    warmup = fields.get("critic_warmup_updates", 0)
    if warmup >= fields.get("updates", 100):
        refused["critic_warmup_updates"] = warmup
        accepted["critic_warmup_updates"] = 0
    arguments = config(**(fields | accepted))
    for name, value in refused.items():
        setattr(arguments, name, value)
    return arguments
