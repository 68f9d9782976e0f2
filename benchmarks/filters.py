"""Rows per second of ``normalize`` and of each filter, on one core.

    .venv/bin/python -m benchmarks.filters [TOKENIZER]

Rows are made up, of 100 words each (30 asked, 70 answered); nothing is dropped. CPU time, best of three.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

from align.config.recipe.filter_settings import FilterStep
from align.config.recipe.step_settings import NormalizeStep
from align.data.rows import Row, assistant, user
from align.data.steps.step import RowStep, StepContext, start_step
from align.stages.data import StepModels

WORDS = """
    the of to and a in is it you that he was for on are with as his they be at one have this from or had by hot word
    but what some we can out other were all there when up use your how said an each she rain cloud river under above
"""
FILTERS: dict[str, Any] = {
    "turns": {"max": 4}, "urls": "drop", "personal_data": {}, "chars": {"max": 4000}, "words": {"max": 500},
    "placeholders": True, "keywords": "self_instruct", "boilerplate": {}, "repetition": {},
    "language": {"keep": ["en"]},
}  # fmt: skip
GOAL = ("chars", "turns", "boilerplate", "urls")
"""Filters that together with ``normalize`` are to do 20,000 rows/s."""


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of short sentences in two paragraphs."""
    rng, words = random.Random(seed), WORDS.split()

    def text(length: int) -> str:
        parts = []
        while length > 0:
            size = min(length, rng.randint(8, 16))
            parts.append(" ".join(rng.choices(words, k=size)).capitalize() + ".")
            length -= size
        return " ".join(parts[:2]) + "\n\n" + " ".join(parts[2:])

    more = {"source": "made", "checks": "", "_where": "made"}
    return [
        {"id": str(index), "prompt": [user(text(30).strip())], "completion": [assistant(text(70))], **more}
        for index in range(count)
    ]


def measure(name: str, steps: list[RowStep], rows: list[Row]) -> None:
    """Print the rate of some steps, one after another."""
    best = 0.0
    for _ in range(3):
        remaining = rows
        start = time.process_time()
        for step in steps:
            remaining = [result for result in step.apply(remaining) if isinstance(result, dict)]
        best = max(best, len(rows) / (time.process_time() - start))
        assert len(remaining) == len(rows), f"{name} dropped {len(rows) - len(remaining)} rows"
    print(f"{name:<45}{best:>12,.0f} rows/s")


def main() -> None:
    """Measure and print."""
    context = StepContext("instructions", 0, Path(), Path(), models=StepModels())
    rows = make_rows(20_000)

    def filtering(**settings: Any) -> RowStep:
        step: RowStep = start_step(FilterStep(type="filter", **settings), context)
        return step

    normalize = start_step(NormalizeStep(type="normalize"), context)
    measure("normalize + " + ", ".join(GOAL), [normalize, filtering(**{name: FILTERS[name] for name in GOAL})], rows)
    measure("normalize", [normalize], rows)
    measure("normalize, fix_encoding", [start_step(NormalizeStep(type="normalize", fix_encoding=True), context)], rows)
    for name, value in FILTERS.items():
        measure(name, [filtering(**{name: value})], rows)
    for tokenizer in sys.argv[1:2]:
        measure("tokens", [filtering(tokens={"tokenizer": tokenizer, "max": 4000})], rows)


if __name__ == "__main__":
    main()
