"""Split an answer into steps, find their last tokens, and combine their scores. Torch-free.

A process reward model scores every step of a solution at its last token (arXiv 2305.20050). A step ends with the
separator's last character, the last step with the end of the turn. Left out: steps without a separator in the text.
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
from align.store.atomic_write import write_text_atomically

Aggregate = Literal["min", "product", "last", "mean"]
FILE, FIELD = "align.json", "steps"


@dataclass(frozen=True)
class Steps:
    """Rule by which a process reward model splits answers; stored in ``align.json`` beside the weights."""

    separator: str
    aggregate: Aggregate

    def write(self, folder: Path) -> None:
        """Add these settings to the folder's ``align.json``."""
        file = folder / FILE
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        write_text_atomically(file, json.dumps(settings | {FIELD: asdict(self)}, indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Steps | None:
        """Return the settings in a folder's ``align.json``; None for a model that scores whole answers."""
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


def combine_steps(logits: Sequence[float], how: Aggregate) -> float:
    """Return one score in (0, 1) from the log-odds of each step being right."""
    chances = [1 / (1 + math.exp(-logit)) if logit > -700 else 0.0 for logit in logits]
    if how == "product":
        return math.prod(chances)
    if how == "last":
        return chances[-1]
    if how == "min":
        return min(chances)
    return sum(chances) / len(chances)


def tokenize_steps(
    tokenizer: Any,
    prompt: list[Message],
    answer: list[Message],
    separator: str,
    *,
    finished: bool = True,
    tools: str | None = "",
) -> tuple[list[int], list[int]]:
    """Return the conversation's token ids as a reward model reads it, and the index of each step's last token.

    Steps of white space are skipped. There is at least one step: the whole answer.
    """
    ids = render_conversation(tokenizer, [*prompt, *answer], finished, tools)
    start = len(render_prompt(tokenizer, prompt, tools))

    def text(end: int) -> str:
        return str(tokenizer.decode(ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    # The separator may begin or end inside a token, so step ends are found by decoding prefixes of the answer.
    parts = text(len(ids)).split(separator)
    places: list[int] = []
    for number in range(len(parts) - 1):
        if not parts[number].strip():
            continue
        # Bisect for the first token that completes this step's separator: text(low) has too few, text(high) enough.
        low, high = start, len(ids)
        while high - low > 1:
            middle = (low + high) // 2
            if text(middle).count(separator) > number:
                high = middle
            else:
                low = middle
        places.append(high - 1)
    if parts[-1].strip() or not places:
        places.append(len(ids) - 1)
    return ids, places
