"""The one visible list of tasks. Torch-free.

A task's name in the YAML is its kind, unless ``task:`` below it says which one it is.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from align.config.validation import suggest
from align.evaluation.tasks.base import TaskConfig
from align.pipeline.registry import load_object

TASKS: dict[str, str] = {
    kind: f"align.evaluation.tasks.{kind}:{''.join(part.capitalize() for part in kind.split('_'))}Config"
    for kind in (
        "ifeval", "gsm8k", "multiple_choice", "xstest", "judged", "preference", "perplexity", "reward_pairs", "lm_eval",
    )
}  # fmt: skip
"""Kind → import path of its settings, in the order of the guide."""

CLASSES: tuple[type[TaskConfig], ...] = tuple(load_object(path) for path in TASKS.values())

if TYPE_CHECKING:
    AnyTask = TaskConfig
else:
    AnyTask = Annotated[functools.reduce(operator.or_, CLASSES), Field(discriminator="task")]
    """Settings of any task."""


def named_tasks(given: Any) -> Any:
    """The ``tasks`` block with every task's kind written out. Raises ``ValueError`` for a name that is no kind."""
    if not isinstance(given, Mapping):
        return given
    found: dict[Any, Any] = {}
    for name, block in given.items():
        if not isinstance(block, Mapping) or "task" in block:
            found[name] = block
        elif name in TASKS:
            found[name] = {"task": name, **block}
        else:
            raise ValueError(
                f"'{name}' is no kind of task.{suggest(str(name), TASKS)} (A name of your own needs `task:` below it.)"
            )
    return found
