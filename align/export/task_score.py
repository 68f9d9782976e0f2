"""Score a checkpoint and its export on instructions whose answers a program checks: the project's embedded ones.

An instruction is solved if the greedy answer satisfies all of its constraints. Checkpoint and export answer the same
instructions, so their difference is paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.checkers import gold
from align.data.families.embedded import generate

if TYPE_CHECKING:
    from align.evaluation.statistics import Difference, Estimate

ITEMS = 50
"""Default number of instructions."""
SMALL = 20_000_000
"""Parameters of a model that is too small to solve any: by default it is not asked, which needs most of the time."""
TOKENS = 64
"""Most tokens of an answer; correct replies are shorter."""
SEED = 40
"""Another seed than that of a calibration, which draws from the same families."""
RESAMPLES = 2000


def task_prompts(folder: Path, items: int) -> list[list[int]]:
    """Return the instructions as token ids."""
    from align.models.chat.render import render_prompt
    from align.models.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    return [render_prompt(tokenizer, row["prompt"]) for row in generate(items, SEED)]


def check_answers(folder: Path, answers: Sequence[Sequence[int]]) -> list[float]:
    """Return 1 for each answer, as token ids, that satisfies all constraints of its instruction, else 0."""
    from align.models.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return [float(score == 1) for score in gold(generate(len(texts), SEED), texts)]


def solved_share(scores: Sequence[float]) -> Estimate | None:
    """Return the share of solved instructions with its 95 % interval; None without instructions."""
    from align.evaluation.statistics import rate_interval

    return rate_interval(scores, 1) if scores else None


def change_of_share(after: Sequence[float], before: Sequence[float]) -> Difference | None:
    """Return the paired difference of two shares with its 95 % interval; None without instructions."""
    from align.evaluation.statistics import paired_difference

    return paired_difference(after, before, resamples=RESAMPLES, seed=0) if before else None
