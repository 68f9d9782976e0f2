"""Tasks of the package reasoning-gym, which makes questions without end and verifies their answers (extra ``gym``).

A row keeps how its question was made, not what the verifier knows: the same seed and number make the same question
again, with everything that belongs to it. Torch-free.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.config.validation import suggest
from align.data.rows import Row, assistant, user
from align.errors import UserError, require_extra, shorten

PACKAGE = "reasoning_gym"
EXTRA = "gym"
ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
KEY = "reasoning_gym"
"""Key of a task in a row's ``checks``."""


def generate(tasks: Sequence[tuple[str, Mapping[str, Any]]], count: int, seed: int, place: str) -> Iterator[Row]:
    """Yield ``count`` rows; the tasks, each a name with the fields of its configuration, take turns.

    Raises ``UserError``, which begins with ``place``, for a task or a field that does not exist.
    """
    require_extra(PACKAGE, EXTRA, f"{place}:")
    for name, arguments in tasks:
        _check_task(name, arguments, place)
    for number in range(count):
        name, arguments = tasks[number % len(tasks)]
        check = {"task": name, "arguments": dict(arguments), "seed": seed, "index": number // len(tasks)}
        text = json.dumps({KEY: check}, sort_keys=True)
        entry = _dataset(name, json.dumps(dict(arguments), sort_keys=True), seed)[check["index"]]
        row: Row = {
            "id": f"gym-{hashlib.sha256(text.encode()).hexdigest()[:12]}",
            "source": f"reasoning_gym/{name}",
            "prompt": [user(entry["question"])],
            "checks": text,
        }
        # Some tasks have many right answers, and name none.
        yield row | ({"completion": [assistant(entry["answer"])]} if isinstance(entry["answer"], str) else {})


def verified(row: Row, response: str) -> float:
    """Return the score of a response, from 0 to 1, by the verifier of the row's task.

    The answer is what the last ``<answer>...</answer>`` holds, or else all of the response. An answer that the
    verifier cannot read scores 0. Raises ``UserError`` for a row of another source.
    """
    require_extra(PACKAGE, EXTRA, "score 'reasoning_gym':")
    checks = json.loads(row["checks"]) if row["checks"] else {}
    if KEY not in checks:
        raise UserError(
            f"row {row['id']} is no task of reasoning-gym; `score: reasoning_gym` needs rows of this source."
        )
    check = checks[KEY]
    dataset = _dataset(check["task"], json.dumps(check["arguments"], sort_keys=True), check["seed"])
    marked = ANSWER.findall(response)
    try:
        score = float(dataset.score_answer(marked[-1] if marked else response.strip(), dataset[check["index"]]))
    except Exception:  # verifiers parse the answer, and some raise for what a model may write
        return 0.0
    return min(1.0, max(0.0, score))


def _check_task(name: str, arguments: Mapping[str, Any], place: str) -> None:
    import reasoning_gym

    tasks = reasoning_gym.factory.DATASETS
    if name not in tasks:
        raise UserError(f"{place}: reasoning-gym has no task '{name}'.{suggest(name, tasks)}")
    try:
        _dataset(name, json.dumps(dict(arguments), sort_keys=True), 0)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{place}: the task '{name}' does not take these arguments: {shorten(str(error))}.") from None


@functools.lru_cache(maxsize=256)
def _dataset(name: str, arguments: str, seed: int) -> Any:
    """Return the dataset of a task; it makes any entry by its number, whatever its size."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(arguments) | {"seed": seed})
