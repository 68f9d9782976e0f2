"""Questions of mathematics and of programming that verifiers check, for ``pipelines/verified.yaml``.

Answers are in ``\\boxed{}`` for the verifier ``math``, and in a block of Python for the verifier ``code``.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

NAMES = ("change", "convert", "compute", "update", "score", "transform")
"""Names of the functions that questions ask for."""
SOURCES = (
    ("x", "the number x", "x"),
    ("a", "the first number of the list a", "a[0]"),
    ("a", "the last number of the list a", "a[-1]"),
    ("a", "the largest number of the list a", "max(a)"),
    ("a", "the smallest number of the list a", "min(a)"),
    ("a", "the sum of the list a", "sum(a)"),
    ("a", "the length of the list a", "len(a)"),
)
"""Argument, description and expression of the value that a function begins with."""


def math_questions(count: int = 400, skip: int = 0, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield equations, fractions and percentages in format ``messages``; the column ``answer`` is in LaTeX.

    ``skip`` leaves out the first questions, which another dataset has.
    """
    generator = random.Random(seed)  # noqa: S311
    makers = (_equation, _fractions, _percentage)
    questions = _distinct(lambda: generator.choice(makers)(generator))
    for question, answer in itertools.islice(questions, skip, skip + count):
        yield _row(f"{question} Put the answer in \\boxed{{}}.", f"\\boxed{{{answer}}}") | {"answer": answer}


def code_questions(count: int = 400, skip: int = 0, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield functions to write in format ``messages``; the column ``tests`` has asserts as JSON text.

    ``skip`` leaves out the first questions, as in ``math_questions``.
    """
    generator = random.Random(seed)  # noqa: S311
    questions = _distinct(lambda: _function(generator))
    for question, (program, tests) in itertools.islice(questions, skip, skip + count):
        yield _row(question, f"```python\n{program}\n```") | {"tests": tests}


def _row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _distinct(make: Callable[[], tuple[str, Any]], attempts: int = 20_000) -> Iterator[tuple[str, Any]]:
    """Yield each question that ``attempts`` calls make once, with its answer."""
    seen: set[str] = set()
    for _ in range(attempts):
        question, answer = make()
        if question not in seen:
            seen.add(question)
            yield question, answer


def _equation(generator: random.Random) -> tuple[str, str]:
    factor = generator.randint(2, 9)
    root = generator.randint(1, 12)
    term = generator.randint(1, 20)
    return f"Solve {factor}x + {term} = {factor * root + term} for x.", str(root)


def _fractions(generator: random.Random) -> tuple[str, str]:
    bottom = generator.randint(3, 12)
    first = generator.randint(1, bottom - 1)
    second = generator.randint(1, bottom - 1)
    return f"What is {first}/{bottom} + {second}/{bottom}?", _latex(Fraction(first + second, bottom))


def _percentage(generator: random.Random) -> tuple[str, str]:
    percent = generator.choice((10, 20, 25, 50, 75))
    whole = 4 * generator.randint(2, 60)
    return f"What is {percent}% of {whole}?", _latex(Fraction(percent * whole, 100))


def _latex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _function(generator: random.Random) -> tuple[str, tuple[str, str]]:
    """Return a question for a function of one to three steps, with the program and its tests."""
    name = generator.choice(NAMES)
    argument, description, expression = generator.choice(SOURCES)
    steps = [f"takes {description}"]
    for _ in range(generator.randint(1, 2)):
        step, expression = _operation(generator, expression)
        steps.append(step)
    question = f"Write a Python function `{name}({argument})` that {', '.join(steps)}, and returns the result."
    return question, (
        f"def {name}({argument}):\n    return {expression}",
        _tests(generator, name, argument, expression),
    )


def _operation(generator: random.Random, expression: str) -> tuple[str, str]:
    """Return the words for a further operation, and the expression with it."""
    number = generator.randint(2, 9)
    inner = f"({expression})" if " " in expression else expression
    return generator.choice(
        (
            (f"adds {number}", f"{expression} + {number}"),
            (f"subtracts {number}", f"{expression} - {number}"),
            (f"multiplies it by {number}", f"{inner} * {number}"),
            ("squares it", f"{inner} ** 2"),
        )
    )


def _tests(generator: random.Random, name: str, argument: str, expression: str) -> str:
    """Return asserts for three inputs."""
    tests = []
    for _ in range(3):
        numbers = [generator.randint(-20, 20) for _ in range(generator.randint(3, 6))]
        value = numbers if argument == "a" else numbers[0]
        result = eval(expression, {argument: value})  # noqa: S307 - an expression of this file
        tests.append(f"assert {name}({value}) == {result}")
    return json.dumps(tests)
