"""A calculator that a policy learns to call: ``environment: {class: "examples.calculator:Calculator", ...}``.

A class is one instance for each episode. Its public methods are the tools: type hints and docstrings tell the model how
to call them. ``reset`` begins the episode, ``score`` ends it.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
LONGEST = 200
"""Characters of an expression."""


def products(count: int = 600, smallest: int = 12, largest: int = 99, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield questions with their answers, as records of format ``gsm8k``; every product at most once."""
    pairs = [(first, second) for first in range(smallest, largest + 1) for second in range(smallest, largest + 1)]
    random.Random(seed).shuffle(pairs)  # noqa: S311
    for first, second in pairs[:count]:
        yield {"question": f"What is {first} * {second}?", "answer": f"#### {first * second}"}


class Calculator:
    """A question with one right number, and a tool to find it."""

    def __init__(self, call_reward: float = 0.0) -> None:
        """Keep the reward of a right call, which teaches a policy that never calls anything to begin with it."""
        self.call_reward = call_reward
        self.answer = 0.0
        self.has_right_call = False

    def reset(self, row: dict[str, Any]) -> str:
        """Begin an episode with the question of a row."""
        self.answer = last_number(row["answer"]) or 0.0
        self.has_right_call = False
        return str(row["prompt"][-1]["content"])

    def calculate(self, expression: str) -> str:
        """Calculate an arithmetic expression.

        Args:
            expression: Numbers with + - * / // % and brackets, such as "(12 + 3) * 4".

        Returns:
            The number.
        """
        value = evaluate(expression)
        self.has_right_call |= value == self.answer
        return str(value)

    def score(self, response: str) -> dict[str, float]:
        """Return 1 for an answer whose last number is right, and the reward of a right call."""
        return {
            "right": float(last_number(response) == self.answer),
            "called": self.call_reward * self.has_right_call,
        }

    def state(self) -> dict[str, Any]:
        """Return all that ``load`` needs: a killed run then goes on without calling the tools again."""
        return {"answer": self.answer, "has_right_call": self.has_right_call}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where another instance was."""
        self.answer, self.has_right_call = state["answer"], state["has_right_call"]


def evaluate(expression: str) -> int | float:
    """Return the value of an expression; raise ``ValueError`` or ``ZeroDivisionError``, which the model reads."""
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has more than {LONGEST} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("this is no arithmetic expression") from None


def last_number(text: str) -> float | None:
    """Return the last number in a text, or None."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.operand))  # type: ignore[no-any-return]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))  # type: ignore[no-any-return]
    raise ValueError("only numbers, + - * / // % and brackets are allowed")
