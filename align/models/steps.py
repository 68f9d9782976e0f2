"""Steps of an answer: where each ends among its tokens, and how their scores become one. Torch-free.

A process reward model scores every step of a solution at its last token (arXiv 2305.20050). A step ends with the
separator's last character, the last one with the end of the turn. Left out: steps that no text separates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from align.errors import UserError
from align.models.files import read_optional
from align.models.render import Message, render_conversation, render_prompt

Aggregate = Literal["min", "product", "last", "mean"]
FILE, FIELD = "align.json", "steps"


@dataclass(frozen=True)
class Steps:
    """How a process reward model reads an answer; it lies in ``align.json`` beside the weights."""

    separator: str
    aggregate: Aggregate

    def write(self, folder: Path) -> None:
        """Add it to the folder's ``align.json``."""
        file = folder / FILE
        whole = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(json.dumps(whole | {FIELD: asdict(self)}, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Steps | None:
        """What is written there; None for a model that scores whole answers."""
        settings = read_optional(folder / FILE).get(FIELD)
        if settings is None:
            return None
        try:
            steps = cls(**settings)
        except TypeError:
            steps = cls("", "min")
        if not steps.separator or not isinstance(steps.separator, str) or steps.aggregate not in get_args(Aggregate):
            raise UserError(f"{folder / FILE}: its field '{FIELD}' does not say how answers are cut into steps.")
        return steps


def combined(logits: Sequence[float], how: Aggregate) -> float:
    """One score in (0, 1) from the logits of an answer's steps, each the log-odds that the step is right."""
    chances = [1 / (1 + math.exp(-logit)) if logit > -700 else 0.0 for logit in logits]
    if how == "product":
        return math.prod(chances)
    if how == "last":
        return chances[-1]
    return min(chances) if how == "min" else sum(chances) / len(chances)


def step_ends(
    tokenizer: Any,
    prompt: list[Message],
    answer: list[Message],
    separator: str,
    finished: bool = True,
    tools: str | None = "",
) -> tuple[list[int], list[int]]:
    """Token ids of the conversation as a reward model reads it, and the place of each step's last token.

    Steps of white space alone are none. There is one step at least: the whole answer.
    """
    ids = render_conversation(tokenizer, [*prompt, *answer], finished, tools)
    start = len(render_prompt(tokenizer, prompt, tools))

    def text(end: int) -> str:
        return str(tokenizer.decode(ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    parts = text(len(ids)).split(separator)
    places: list[int] = []
    for number in range(len(parts) - 1):
        if not parts[number].strip():
            continue
        low, high = start, len(ids)  # text(low) has too few separators, text(high) enough
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if text(middle).count(separator) > number else (middle, high)
        places.append(high - 1)
    if parts[-1].strip() or not places:
        places.append(len(ids) - 1)
    return ids, places
