"""Conversations for stage ``sft`` that show how the calculator of ``examples/calculator.py`` is called.

Only some of them call it, the others answer at once: what pays is left to reinforcement learning.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

from align.environments.environment import tool_schema
from examples.calculator import Calculator, products


def conversations(count: int = 240, calling: float = 0.4, skip: int = 600, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield records of format ``messages``; a share ``calling`` of them calls the calculator.

    ``skip`` is the number of questions that ``products`` yields with the same seed elsewhere: none is asked twice.
    """
    tools = json.dumps([tool_schema(Calculator.calculate, "calculate", "examples/calculator_rows.py")])
    generator = random.Random(seed)  # noqa: S311
    for row in itertools.islice(products(skip + count, seed=seed), skip, None):
        product = row["answer"].removeprefix("#### ")
        messages: list[dict[str, Any]] = [{"role": "user", "content": row["question"]}]
        if generator.random() < calling:
            expression = row["question"].removeprefix("What is ").removesuffix("?")
            call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": expression}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "calculate", "content": product})
        messages.append({"role": "assistant", "content": f"The answer is {product}."})
        yield {"messages": messages, "tools": tools}
