"""Questions with a thought and an answer, which ``pipelines/reason.yaml`` trains on.

A program writes the thoughts: the partial results of a sum, and numbers in order. Each answer is one number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

RANKS = ("smallest", "second smallest", "third smallest", "second largest", "largest")
"""Names of the ranks of five numbers, in order of size."""


def questions(count: int = 3000, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield sums and ranks in turn, with the column ``task``: a stage that reads the first rows gets both."""
    for record, other in zip(sums(count // 2, seed=seed), ranks(count // 2, seed=seed), strict=True):
        yield record | {"task": "sum"}
        yield other | {"task": "rank"}


def sums(count: int = 1500, terms: int = 5, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield sums and differences of ``terms`` numbers; their thoughts have every partial result, from 0 to 99."""
    return _distinct(count, seed, lambda generator: _make_sum(generator, terms))


def ranks(count: int = 1500, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield questions for one of five numbers by its rank; their thoughts have the numbers in order of size."""
    return _distinct(count, seed, _make_rank)


def _distinct(
    count: int, seed: int, make: Callable[[random.Random], tuple[str, list[str], int]]
) -> Iterator[dict[str, Any]]:
    """Yield ``count`` records of format ``messages`` with different questions."""
    generator = random.Random(seed)  # noqa: S311
    seen: set[str] = set()
    while len(seen) < count:
        question, steps, answer = make(generator)
        if question in seen:
            continue
        seen.add(question)
        reply = {"role": "assistant", "reasoning_content": "\n".join(steps), "content": str(answer)}
        yield {"messages": [{"role": "user", "content": question}, reply], "answer": str(answer)}


def _make_sum(generator: random.Random, terms: int) -> tuple[str, list[str], int]:
    """Return the question, the steps and the answer of a sum."""
    total = generator.randint(10, 50)
    question = f"What is {total}"
    steps = []
    for _ in range(terms - 1):
        term = generator.randint(2, 19)
        signs = [sign for sign, result in (("+", total + term), ("-", total - term)) if 0 <= result <= 99]
        sign = generator.choice(signs)
        result = total + term if sign == "+" else total - term
        question += f" {sign} {term}"
        steps.append(f"{total}{sign}{term}={result}")
        total = result
    return f"{question}?", steps, total


def _make_rank(generator: random.Random) -> tuple[str, list[str], int]:
    """Return the question, the steps and the answer of a question for a rank."""
    numbers = generator.sample(range(10, 100), len(RANKS))
    rank = generator.randrange(len(RANKS))
    ordered = sorted(numbers)
    question = f"Which is the {RANKS[rank]} of {', '.join(map(str, numbers))}?"
    return question, [str(number) for number in ordered], ordered[rank]
