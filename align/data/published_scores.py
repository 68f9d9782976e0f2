"""Scores by the rules that published results were measured with, for ``pipelines/proof``. Torch-free.

The rules are stricter, or looser, than align's own checkers, and a figure is comparable only under its own rule.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from difflib import SequenceMatcher
from typing import Any

from align.data.rows import Row

_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_REVERSED = re.compile(r"<reversed_text>(.*?)</reversed_text>", re.DOTALL)
_EQUATION = re.compile(r"[\d+\-*/().\s]{1,200}")
"""Signs of an equation, and its most characters: four numbers need fewer, and deep brackets exhaust the stack."""
_OPERATORS: Mapping[type[ast.operator | ast.unaryop], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FORMAT_SCORE = 0.1
"""Score of a countdown answer that is marked and wrong."""


def gsm8k_strict(rows: list[Row], responses: list[str]) -> list[float]:
    """Return 1.0 if the first ``#### N`` of a response is exactly the row's answer, else 0.0.

    This is verl's rule before June 2025 (verl/utils/reward_score/gsm8k.py): one space after the mark, commas removed,
    and texts compared, so ``#### 72.`` and ``#### 72.0`` are wrong for 72. Raises ``ValueError`` for a row without an
    answer.
    """
    scores = []
    for row, response in zip(rows, responses, strict=True):
        checks = json.loads(row["checks"]) if row["checks"] else {}
        if "answer" not in checks:
            raise ValueError(f"row {row['id']} has no answer in its checks; gsm8k_strict needs rows of format gsm8k")
        marked = _MARKED.search(response)
        is_right = marked is not None and marked[1].replace(",", "") == str(checks["answer"]).replace(",", "")
        scores.append(float(is_right))
    return scores


def countdown(row: Row, response: str) -> float:
    """Return 1 for an equation that reaches the target, 0.1 for any other marked answer, 0 for none.

    TinyZero's rule: the last ``<answer>`` counts, and its equation uses each number of the row's column ``nums``
    exactly once. ``target`` is the column of the result. Only ``+ - * /``, signs and brackets are calculated. Python's
    ``**`` and ``//``, which TinyZero's ``eval`` accepts, are wrong here. Raises ``ValueError`` for a row without the
    columns.
    """
    if "nums" not in row or "target" not in row:
        raise ValueError(f"row {row['id']} has no columns nums and target; keep them in the recipe")
    answers = _ANSWER.findall(response)
    if not answers:
        return 0.0
    value = _calculate(answers[-1].strip(), sorted(int(number) for number in row["nums"]))
    return 1.0 if value is not None and abs(value - row["target"]) < 1e-5 else FORMAT_SCORE


def reverse_text(row: Row, response: str) -> float:
    """Return the similarity, from 0 to 1, of the text in ``<reversed_text>`` and the row's last message, reversed.

    This is the reward of the environment ``reverse-text`` of verifiers: ``difflib``'s ratio of the first match, or of
    an empty text if there is none.
    """
    marked = _REVERSED.search(response)
    answer = marked[1].strip() if marked else ""
    return SequenceMatcher(None, answer, row["prompt"][-1]["content"][::-1]).ratio()


def _calculate(equation: str, numbers: list[int]) -> float | None:
    """Return the value of an equation, None if it does not use exactly the sorted ``numbers`` or is not one."""
    if not _EQUATION.fullmatch(equation) or sorted(map(int, re.findall(r"\d+", equation))) != numbers:
        return None
    try:
        return _value(ast.parse(equation, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError):
        return None


def _value(node: Any) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")
