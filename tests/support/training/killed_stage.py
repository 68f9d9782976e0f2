"""Stages that die at a chosen step, for tests of resuming."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from align.pipeline.context import StageContext


class Killed(BaseException):
    """Ends a stage like a kill: nothing catches it."""


class Dying(StageContext):
    """A context that kills the stage when step ``DIES_AT`` is reported."""

    dies_at = 0
    unit = "steps"

    def progress(self, done: float, total: float, unit: str = "steps", **shown: Any) -> None:
        super().progress(done, total, unit, **shown)
        if unit == self.unit and done == self.dies_at:
            raise Killed


def dying(plain: StageContext, step: int, unit: str = "steps") -> StageContext:
    killed = Dying(**{field.name: getattr(plain, field.name) for field in fields(plain)})
    object.__setattr__(killed, "dies_at", step)
    object.__setattr__(killed, "unit", unit)
    return killed
