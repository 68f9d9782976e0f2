"""A pipeline with a loop, of toy stages."""

from __future__ import annotations

from typing import Any

NUMBER, SUM = "tests.support.toy:NUMBER", "tests.support.toy:SUM"


def looped(rounds: int = 3, after: dict[str, Any] | None = None, **loop: Any) -> dict[str, Any]:
    """Return a pipeline that starts at 1; every round draws a number and adds it to the previous round's total."""
    block = {
        "rounds": rounds,
        "carry": {"before": {"first": "start", "then": "total"}},
        "stages": {
            "drawn": {"stage": NUMBER, "number": 2},
            "total": {"stage": SUM, "first": "before", "others": ["drawn"]},
        },
        **loop,
    }
    stages = {"start": {"stage": NUMBER, "number": 1}, "loop": block, **(after or {})}
    return {"name": "looped", "seed": 3, "stages": stages}
