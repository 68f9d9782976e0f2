"""Writes the files of an evaluation.

- ``scorecard.json``: schema in ``scorecard_builder.py``
- ``samples.jsonl``: a line per question that systems answered: ``task`` (``prompts`` for the prompt set), ``id``,
  ``source``, ``prompt`` (messages), ``row`` (columns that the recipe keeps, if any) and ``responses``, system →
  samples, each ``{text, tokens, finished}``, with ``thought_tokens``, ``thought_end`` (characters) and ``open_thought``
  if the response has a thought, ``reward`` and ``kl`` if they were measured, ``scores`` (of
  programs, or the task's metrics), ``turns`` (in conversations of several), ``token_kl`` (``[[text, nats], …]``, of
  first samples). An episode also has ``messages``, ``calls`` (with results and errors), ``parts`` of its score,
  ``turn_scores``, ``stop`` and ``failure``, its ``tokens`` are those that the policy sampled, and ``prompt`` is how the
  environment began it. A pair that reward models scored has its two sides as ``responses``, named in ``columns``, and
  ``scores`` by reward model
- ``items.jsonl``: a line per item of every task: ``task``, ``id``, ``source``, ``values``: system → metric → one number
  per sample, without the metrics that leave the item out. For pairs, ``values`` are the reward models':
  ``chosen``, ``rejected``, ``margin``, ``correct``
- ``judgments.jsonl``, if an endpoint judged answers: a line per judged question: ``task``, ``id``, and either
  ``system``, ``turn``, ``grade`` and ``text``, or for two systems ``one``, ``other``, ``outcome`` and ``orders``: for
  both orders the systems as they were ``shown``, the ``verdict`` and the ``text``. Equal answers are a tie without a
  line
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.rows import kept_columns
from align.environments.episode import Episode, describe_episode, opening
from align.evaluation.answers import Answers, Episodes, Item, SystemResponses, Turn, Values
from align.evaluation.comparisons import Column
from align.evaluation.scorecard import ITEMS, JUDGMENTS, SAMPLES, SCORECARD
from align.evaluation.scorecard.scorecard_builder import Measurements, TaskResult
from align.evaluation.tasks.environment import SCORE
from align.inference.thoughts import thought_facts
from align.models.chat.render import token_texts
from align.store.json_files import write_text_atomically

if TYPE_CHECKING:
    from align.evaluation.plan import Plan

SAMPLE_FIELDS = ("reward", "kl")


def write(
    folder: Path,
    plan: Plan,
    card: dict[str, Any],
    responses: SystemResponses,
    *,
    measurements: Measurements,
    token_kl: dict[str, list[list[float]]],
) -> None:
    """Write the files into ``folder``."""
    text = json.dumps(card, indent=1, allow_nan=False)
    write_text_atomically(folder / SCORECARD, text + "\n")
    with (folder / SAMPLES).open("w", encoding="utf-8") as file:
        for line in _prompt_samples(plan, responses, measurements, token_kl):
            file.write(json.dumps(line) + "\n")
        for result in measurements.tasks:
            for line in _task_lines(result, responses):
                file.write(json.dumps(line) + "\n")
    with (folder / ITEMS).open("w", encoding="utf-8") as file:
        for line in _items(plan, measurements):
            file.write(json.dumps(line) + "\n")
    judgments = [line for result in measurements.tasks for line in result.task.judgments()]
    if judgments:
        with (folder / JUDGMENTS).open("w", encoding="utf-8") as file:
            for line in judgments:
                file.write(json.dumps(line) + "\n")


def _prompt_samples(
    plan: Plan, responses: SystemResponses, measurements: Measurements, token_kl: dict[str, list[list[float]]]
) -> Iterator[dict[str, Any]]:
    tokenizers = {system.name: system.policy.tokenizer for system in plan.systems}
    explanations = {name: iter(told) for name, told in measurements.explanations.items()}
    for index, row in enumerate(plan.rows):
        by_system: dict[str, Any] = {}
        for name, response_set in responses.prompt_set.items():
            values = measurements.values[name]
            samples = []
            for number, response in enumerate(response_set.responses[index]):
                sample = {"text": response.text, "tokens": len(response.token_ids), "finished": response.finished}
                sample |= thought_facts(response)
                explanation = next(explanations.get(name, iter(())), None)
                sample |= {"explanation": explanation} if explanation else {}
                measured = {field: values[field][index][number] for field in SAMPLE_FIELDS if field in values}
                # A metric that a reward returns is missing if some response lacks it.
                scores = {metric: values[metric][index][number] for metric in measurements.programs if metric in values}
                samples.append(sample | measured | ({"scores": scores} if scores else {}))
            # KL by token exists only for the first response to the first prompts.
            if index < len(token_kl.get(name, ())) and samples:
                ids = response_set.responses[index][0].token_ids
                pieces = token_texts(tokenizers[name], ids)
                samples[0]["token_kl"] = [list(pair) for pair in zip(pieces, token_kl[name][index], strict=True)]
            by_system[name] = samples
        yield {
            "task": "prompts",
            "id": row["id"],
            "source": row["source"],
            "prompt": row["prompt"],
            **({"row": columns} if (columns := kept_columns(row)) else {}),
            "responses": by_system,
        }


def _task_lines(result: TaskResult, responses: SystemResponses) -> Iterator[dict[str, Any]]:
    name = result.task.name
    if responses.episodes.get(name):
        return episode_samples(result, responses.episodes[name])
    answers = responses.answers.get(name, {})
    return _task_samples(result, answers) if answers else _scored_answers(result)


def _task_samples(result: TaskResult, answers: dict[str, Answers]) -> Iterator[dict[str, Any]]:
    for index, item in enumerate(result.task.items):
        by_system = {
            name: [_sample(result, name, index, number, turns) for number, turns in enumerate(per_item[index])]
            for name, per_item in answers.items()
        }
        yield _head(result, item) | {"responses": by_system}


def _scored_answers(result: TaskResult) -> Iterator[dict[str, Any]]:
    """Yield answers that came with the items; most tasks have none."""
    for item, sides in zip(result.task.items, result.task.item_answers(), strict=False):
        yield _head(result, item) | {"columns": list(sides), "responses": sides}


def _head(result: TaskResult, item: Item) -> dict[str, Any]:
    return {"task": result.task.name, "id": item.id, "source": item.source, "prompt": item.prompt}


def _sample(result: TaskResult, name: str, index: int, number: int, turns: list[Turn]) -> dict[str, Any]:
    """Return one sample of one item with its scores; a task with one value per item gives it to all samples."""
    last = turns[-1].response
    sample: dict[str, Any] = {"text": last.text, "tokens": len(last.token_ids), "finished": last.finished}
    sample |= thought_facts(last)
    measured = result.measured.get(name)
    if measured is not None:
        # An item with weight 0 has no number in that metric.
        sample["scores"] = {
            metric: values[index][min(number, len(values[index]) - 1)]
            for metric, values in measured.values.items()
            if values[index] and measured.weights.get(metric, [1.0] * (index + 1))[index] > 0
        }
    if len(turns) > 1:
        sample["turns"] = [
            {"prompt": turn.prompt[-1]["content"], "text": turn.response.text, "finished": turn.response.finished}
            | thought_facts(turn.response)
            for turn in turns
        ]
    return sample


def _items(plan: Plan, measurements: Measurements) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(plan.rows):
        values = {
            name: {metric: column[index] for metric, column in metrics.items()}
            for name, metrics in measurements.values.items()
        }
        yield {"task": "prompts", "id": row["id"], "source": row["source"], "values": values}
    for result in measurements.tasks:
        task = result.task
        # Metric → values and the items it counts, by system.
        columns: dict[str, dict[str, tuple[Values, set[int]]]] = {}
        for name, measured in result.measured.items():
            columns[name] = {
                metric: (values, set(Column(values, measured.weights.get(metric)).counted))
                for metric, values in measured.values.items()
            }
        scorers = task.item_values()
        for index, item in enumerate(task.items):
            # Items of weight 0 are skipped, so readers who pair items pair what was counted.
            numbers: dict[str, Any] = {
                name: {metric: values[index] for metric, (values, counted) in metrics.items() if index in counted}
                for name, metrics in columns.items()
            }
            numbers |= {name: per_item[index] for name, per_item in scorers.items()}
            yield {"task": task.name, "id": item.id, "source": item.source, "values": numbers}


def episode_samples(result: TaskResult, episodes: Mapping[str, Episodes]) -> Iterator[dict[str, Any]]:
    """Yield a line for each row that systems played; ``prompt`` is how the environment began its episodes."""
    for index, item in enumerate(result.task.items):
        openings = [opening(episode) for per_item in episodes.values() for episode in per_item[index]]
        responses = {
            name: [
                describe_episode(episode) | {"scores": _scores(result, name, index, number, episode)}
                for number, episode in enumerate(per_item[index])
            ]
            for name, per_item in episodes.items()
        }
        prompt = next(filter(None, openings), item.prompt)
        yield _head(result, item) | {"prompt": prompt, "responses": responses}


def _scores(result: TaskResult, name: str, index: int, number: int, episode: Episode) -> dict[str, float]:
    """Return an episode's numbers. A number of its row, such as pass@k, belongs to all of the row's episodes."""
    scores = {}
    for metric, values in result.measured[name].values.items():
        numbers = values[index]
        if metric == SCORE:
            # An episode that failed has none, so the other scores are not at their own numbers.
            numbers = [] if math.isnan(episode.score) else [episode.score]
        if numbers:
            scores[metric] = numbers[min(number, len(numbers) - 1)]
    return scores
