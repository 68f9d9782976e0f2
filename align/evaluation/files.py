"""The files of an evaluation.

- ``scorecard.json``: schema in ``scorecard.py``
- ``samples.jsonl``: a line per question that systems answered: ``task`` (``prompts`` for the prompt set), ``id``,
  ``source``, ``prompt`` (messages) and ``responses``, system → samples, each ``{text, tokens, finished}``, with
  ``gold``, ``reward`` and ``kl`` where they were measured, ``scores`` (the task's metrics), ``turns`` (all of them, in
  conversations of several), ``token_kl`` (``[[text, nats], …]``, of first samples). A pair that reward models scored
  has its two sides as ``responses``, named in ``columns``, and ``scores`` by reward model
- ``items.jsonl``: a line per item of every task: ``task``, ``id``, ``source``, ``values``, system → metric → one number
  a sample; an item that takes no part in a metric has none of it. Of pairs ``values`` are the reward models':
  ``chosen``, ``rejected``, ``margin``, ``correct``
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.evaluation.comparisons import Column
from align.evaluation.scorecard import Measurements, TaskFound
from align.evaluation.tasks.base import Answers, Turn
from align.models.token_texts import token_texts

if TYPE_CHECKING:
    from align.evaluation.plan import Answered, Plan

SAMPLE_FIELDS = ("gold", "reward", "kl")


def write(
    folder: Path,
    plan: Plan,
    card: dict[str, Any],
    answered: Answered,
    found: Measurements,
    token_kl: dict[str, list[list[float]]],
) -> None:
    """Write all three."""
    text = json.dumps(card, indent=1, allow_nan=False)
    (folder / "scorecard.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for line in _prompt_samples(plan, answered, found, token_kl):
            file.write(json.dumps(line) + "\n")
        for one in found.tasks:
            answers = answered.answers.get(one.task.name, {})
            for line in _task_samples(one, answers) if answers else _scored_answers(one):
                file.write(json.dumps(line) + "\n")
    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        for line in _items(plan, found):
            file.write(json.dumps(line) + "\n")


def _prompt_samples(
    plan: Plan, answered: Answered, found: Measurements, token_kl: dict[str, list[list[float]]]
) -> Iterator[dict[str, Any]]:
    tokenizers = {system.name: system.policy.tokenizer for system in plan.systems}
    for index, row in enumerate(plan.rows):
        responses: dict[str, Any] = {}
        for name, generated in answered.generated.items():
            values = found.values[name]
            samples = [
                {"text": one.text, "tokens": len(one.token_ids), "finished": one.finished}
                | {field: values[field][index][at] for field in SAMPLE_FIELDS if field in values}
                for at, one in enumerate(generated.responses[index])
            ]
            if index < len(token_kl.get(name, ())) and samples:
                ids = generated.responses[index][0].token_ids
                pieces = token_texts(tokenizers[name], ids)
                samples[0]["token_kl"] = [list(pair) for pair in zip(pieces, token_kl[name][index], strict=True)]
            responses[name] = samples
        yield {"task": "prompts", "id": row["id"], "source": row["source"], "prompt": row["prompt"],
               "responses": responses}  # fmt: skip


def _task_samples(one: TaskFound, answers: dict[str, Answers]) -> Iterator[dict[str, Any]]:
    for index, item in enumerate(one.task.items):
        responses = {
            name: [_sample(one, name, index, at, sample) for at, sample in enumerate(per_item[index])]
            for name, per_item in answers.items()
        }
        yield {"task": one.task.name, "id": item.id, "source": item.source, "prompt": item.prompt,
               "responses": responses}  # fmt: skip


def _scored_answers(one: TaskFound) -> Iterator[dict[str, Any]]:
    """Answers that came with the items; none in most tasks."""
    for item, sides in zip(one.task.items, one.task.item_answers(), strict=False):
        yield {
            "task": one.task.name,
            "id": item.id,
            "source": item.source,
            "prompt": item.prompt,
            "columns": list(sides),
            "responses": sides,
        }


def _sample(one: TaskFound, name: str, index: int, at: int, turns: list[Turn]) -> dict[str, Any]:
    last = turns[-1].response
    found: dict[str, Any] = {"text": last.text, "tokens": len(last.token_ids), "finished": last.finished}
    measured = one.measured.get(name)
    if measured is not None:
        found["scores"] = {
            metric: values[index][min(at, len(values[index]) - 1)]
            for metric, values in measured.values.items()
            if values[index] and measured.weights.get(metric, [1.0] * (index + 1))[index] > 0
        }
    if len(turns) > 1:
        found["turns"] = [
            {"prompt": turn.prompt[-1]["content"], "text": turn.response.text, "finished": turn.response.finished}
            for turn in turns
        ]
    return found


def _items(plan: Plan, found: Measurements) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(plan.rows):
        values = {
            name: {metric: per[index] for metric, per in metrics.items()} for name, metrics in found.values.items()
        }
        yield {"task": "prompts", "id": row["id"], "source": row["source"], "values": values}
    for one in found.tasks:
        columns = {
            name: {metric: Column(values, measured.weights.get(metric)) for metric, values in measured.values.items()}
            for name, measured in one.measured.items()
        }
        scorers = one.task.item_values()
        counted = {name: {metric: set(c.counted) for metric, c in per.items()} for name, per in columns.items()}
        for index, item in enumerate(one.task.items):
            per_system = {
                name: {metric: column.values[index] for metric, column in per.items() if index in counted[name][metric]}
                for name, per in columns.items()
            }
            per_scorer = {name: per_item[index] for name, per_item in scorers.items()}
            numbers: dict[str, Any] = {**per_system, **per_scorer}
            yield {"task": one.task.name, "id": item.id, "source": item.source, "values": numbers}
