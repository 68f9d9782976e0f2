"""Plain functions as tools, and one that scores.

``environment: {tools: ["examples.tools:search", "examples.tools:calculate"], score: "examples.tools:right_answer"}``

Functions keep nothing between calls. What must be remembered over an episode belongs into a class
(``examples/calculator.py``).
"""

from __future__ import annotations

from typing import Any

from examples.calculator import evaluate, last_number

FACTS = {
    "the Eiffel Tower": "The Eiffel Tower is 330 metres high and was opened in 1889.",
    "Mount Everest": "Mount Everest is 8849 metres high.",
    "the Nile": "The Nile is 6650 kilometres long.",
    "a marathon": "A marathon is 42.195 kilometres long.",
    "the Moon": "The Moon is 384400 kilometres away.",
}


def search(query: str) -> str:
    """Search an encyclopedia.

    Args:
        query: Words to look for.

    Returns:
        The sentences that have the most of these words.
    """
    words = set(query.lower().split())
    hits = {text: len(words & set(text.lower().rstrip(".").split())) for text in FACTS.values()}
    most = max(hits.values())
    return "\n".join(text for text, count in hits.items() if count == most) if most else "Nothing was found."


def calculate(expression: str) -> str:
    """Calculate an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % and brackets, such as "(12 + 3) * 4".

    Returns:
        The number.
    """
    return str(evaluate(expression))


def right_answer(row: dict[str, Any], messages: list[dict[str, Any]], call_reward: float = 0.1) -> dict[str, float]:
    """Return 1 for a right answer in the last turn, and a little for having asked a tool.

    A function that scores takes the row, and the ``messages`` of the episode or the ``response`` of its last turn.
    """
    turns = [message["content"] for message in messages if message["role"] == "assistant"]
    is_right = bool(turns) and last_number(turns[-1]) == last_number(str(row["answer"]))
    is_tool_used = any(message["role"] == "tool" for message in messages)
    return {"right": float(is_right), "asked": call_reward * is_tool_used}
