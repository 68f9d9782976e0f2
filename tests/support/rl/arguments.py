"""Arguments of trainers with values that no user may give, for tests that isolate a part of an update."""

from __future__ import annotations

from typing import Any, TypeVar

from align.rl.arguments import RolloutArguments

Arguments = TypeVar("Arguments", bound=RolloutArguments)


def unbounded(config: type[Arguments], **fields: Any) -> Arguments:
    """Return arguments in which a rate or a norm of 0, which the settings refuse, is set after their check."""
    zeros = [name for name in ("learning_rate", "max_grad_norm") if fields.get(name) == 0.0]
    arguments = config(**(fields | dict.fromkeys(zeros, 1.0)))
    for name in zeros:
        setattr(arguments, name, 0.0)
    return arguments
