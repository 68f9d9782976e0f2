"""Samples for the page's script: responses of all systems to a prompt, rollouts, validations and sampled episodes.

Samples are sorted by score change and bounded in size. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Self

from markupsafe import Markup

from align.evaluation.scorecard import program_metrics
from align.report.page.templates import script_json
from align.report.scorecard.rollouts import MAX_TEXT, SampleFile, cut, episode_view, is_episode
from align.report.scorecard.scorecard_tables import PROMPTS, task_title

MAX_BYTES = 7_000_000
"""Text on the page; beyond it the prompts with the smallest score changes are omitted and counted."""
MAX_HEAT_BYTES = 2_500_000
"""Numbers by token on the page, on top of the text."""
MAX_TOKENS = 2_000
"""Tokens of a response that are shown with numbers."""
RESPONSE_FIELDS = ("tokens", "thought_tokens", "finished", "gold", "reward", "kl")
TOKEN_NUMBERS = ("k", "v", "a")
"""KL, value and advantage, in the order in which a line of rollouts has them behind each token's text."""
HUNDREDTHS = 100
COMPONENT = "score_"
"""Beginning of the name of a score that is part of an episode's."""

Sample = dict[str, Any]


def page_samples(
    samples: SampleFile | Sequence[Sample],
    card: dict[str, Any] | None,
    rollouts: Mapping[str, list[Sample]] | None = None,
    validations: Mapping[str, list[list[Sample]]] | None = None,
) -> dict[str, Any]:
    """Return the script's data: ``policies``, ``reference``, ``tasks``, ``items``, and these as JSON in ``encoded``.

    An item has its ``task``, ``source`` and ``prompt`` turns, ``answers`` and mean ``score`` by policy (the score is
    the task's own metric, named in ``tasks``), and the ``change`` of each policy against the reference. The items with
    the largest change come first; a change counts as a share of its task's largest, since tasks have different scales.
    Numbers by token go with the first items until :data:`MAX_HEAT_BYTES` is used. Then come ``validations`` (stage →
    the lines of each prompt), with the updates as ``columns``, and ``rollouts`` (stage → lines), with the responses to
    a prompt as ``columns``.

    ``left_out`` counts the samples beyond :data:`MAX_BYTES`, ``without_heat`` those without their numbers by token.
    ``lengths`` has task → policy → lengths of answers in tokens, over prompts and samples.
    """
    policies, reference = _compared_policies(samples, card)
    overview = _Overview.read(samples, card, policies, reference)
    weights = overview.weights()

    def ordered() -> Iterator[tuple[Sample, Sample]]:
        # The index breaks ties, so equal changes keep the order of the file.
        for index in sorted(range(len(weights)), key=lambda index: (-weights[index], index)):
            # The file is read again only for the samples that fit on the page.
            sample = samples[index]
            item = _item(sample, policies, reference, overview.metrics[_task_of(sample)][0])
            yield item | {"weight": weights[index]}, sample

    shown, encoded, without_heat = _fill_page(ordered(), policies)
    tasks = {
        task: {"title": task_title(card, task) if card else task, "metric": title, "key": key}
        for task, (key, title) in overview.metrics.items()
    }
    rollout_items: list[Sample] = []
    for stage, prompts in (validations or {}).items():
        if prompts:
            title = f"validation of {stage}, by update"
            tasks[f"validation {stage}"] = {"title": title, "metric": "score", "key": "score"}
            rollout_items += [_validation_item(stage, number, lines) for number, lines in enumerate(prompts, start=1)]
    for stage, lines in (rollouts or {}).items():
        if lines:
            tasks[f"rollouts {stage}"] = {"title": f"rollouts of {stage}", "metric": "score", "key": "score"}
            rollout_items += _join_by_prompt(stage, [_rollout_item(stage, line) for line in lines])
    return {
        "policies": policies,
        "reference": reference,
        "tasks": tasks,
        "items": shown + rollout_items,
        "encoded": encoded + [script_json(item) for item in rollout_items],
        "left_out": len(weights) - len(shown),
        "without_heat": without_heat,
        "lengths": overview.lengths,
    }


def _compared_policies(samples: Iterable[Sample], card: dict[str, Any] | None) -> tuple[list[str], str]:
    """Return the compared systems and the reference; without a scorecard those that occur in the samples."""
    if card:
        return list(card["policies"]), str(card["reference"])
    policies = sorted({name for sample in samples for name in sample["responses"]})
    return policies, policies[0] if policies else ""


def _task_of(sample: Sample) -> str:
    return str(sample.get("task", PROMPTS))


@dataclass
class _Overview:
    """The numbers of all samples that decide about their order, and the lengths of their answers."""

    metrics: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Task → the metric that sorts its samples, and its title."""
    changes: list[tuple[str, float]] = field(default_factory=list)
    """Task and largest change of each sample."""
    lengths: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    @classmethod
    def read(cls, samples: Iterable[Sample], card: dict[str, Any] | None, policies: list[str], reference: str) -> Self:
        """Read all samples once."""
        overview = cls()
        for sample in samples:
            task = _task_of(sample)
            if task not in overview.metrics:
                overview.metrics[task] = _sort_metric(card, task)
            changes = _changes(_scores(sample, _columns(sample, policies), overview.metrics[task][0]), reference)
            largest = max((abs(change) for change in changes.values()), default=0.0)
            overview.changes.append((task, largest))
            if "columns" not in sample:
                overview._add_lengths(sample["responses"], task, policies)
        return overview

    def _add_lengths(self, responses: Mapping[str, Any], task: str, policies: list[str]) -> None:
        """Add the lengths of a sample's answers, without conversations of several turns."""
        by_policy = self.lengths.setdefault(task, {policy: [] for policy in policies})
        for policy in policies:
            by_policy[policy] += [
                response["tokens"] - response.get("thought_tokens", 0)
                for response in responses.get(policy, [])
                if "turns" not in response
            ]

    def weights(self) -> list[float]:
        """Return the largest change of each sample as a share of the largest change in its task."""
        largest: dict[str, float] = {}
        for task, change in self.changes:
            # Scores of tasks have different units: as shares of their task's largest change they can be sorted.
            largest[task] = max(largest.get(task, 0.0), change)
        return [round(change / largest[task], 4) if largest[task] else 0.0 for task, change in self.changes]


def _fill_page(
    ordered: Iterable[tuple[Sample, Sample]], policies: Sequence[str]
) -> tuple[list[Sample], list[Markup], int]:
    """Return the items that fit on the page, also as JSON, and the number of items without numbers by token.

    ``ordered`` has pairs of item and sample. Texts and numbers by token have a budget of bytes each. Once the second is
    used up, items go without numbers.
    """
    shown: list[Sample] = []
    encoded: list[Markup] = []
    text_bytes = 0
    heat_bytes_left = MAX_HEAT_BYTES
    without_heat = 0
    for item, sample in ordered:
        text = script_json(item)
        text_bytes += len(text.encode())
        # Items are sorted by weight: everything from here on changed less.
        if text_bytes > MAX_BYTES:
            break
        if _has_token_numbers(sample, policies):
            # Numbers by token have their own budget, or a few long answers would push out the other prompts.
            heat = _token_numbers(sample, policies) if heat_bytes_left > 0 else {}
            heat_bytes_left -= len(script_json(heat).encode())
            if heat_bytes_left > 0:
                for policy, numbers in heat.items():
                    item["answers"][policy][0]["heat"] = numbers
                text = script_json(item)
            else:
                without_heat += 1
        shown.append(item)
        encoded.append(text)
    return shown, encoded, without_heat


def page_json(page: Mapping[str, Any]) -> Markup:
    """Return the result of :func:`page_samples` as JSON for the page's script; its items are encoded already."""
    # Items were encoded to measure them; encoding several MB again would double the time.
    head = script_json({name: page[name] for name in ("policies", "reference", "tasks")})
    return Markup(f'{head[:-1]},"items":[{",".join(page["encoded"])}]}}')  # noqa: S704  (parts are encoded)


def _sort_metric(card: dict[str, Any] | None, task: str) -> tuple[str, str]:
    """Return the metric whose change sorts a task's samples, as ``samples.jsonl`` names it, and its title."""
    if card is None:
        return "gold", "gold"
    if task in card["tasks"]:
        primary = str(card["tasks"][task]["primary"])
        scorers = [str(report.get("stage")) for report in card.get("reward_models", ()) if report.get("task") == task]
        # Pairs for reward models have no metric, so sort them by the first model's score.
        if primary not in card["metrics"] and scorers:
            return scorers[0], f"score by {scorers[0]}"
        return primary.removeprefix(f"{task}."), str(card["metrics"].get(primary, {}).get("title", primary))
    scored = [*program_metrics(card["metrics"]), "reward"]
    name = card["primary"] if card["primary"] in scored else scored[0]
    return name, name


def _columns(sample: Sample, policies: list[str]) -> list[str]:
    """Return the names of a sample's responses: the compared systems, unless the sample has ``columns``."""
    return [str(name) for name in sample["columns"]] if sample.get("columns") is not None else policies


def _scores(sample: Sample, columns: list[str], metric: str) -> dict[str, float | None]:
    """Return the mean score by ``metric`` of each column."""
    means: dict[str, float | None] = {}
    for name in columns:
        scores = [_score(response, metric) for response in sample["responses"].get(name) or []]
        numbers = [score for score in scores if score is not None]
        means[name] = sum(numbers) / len(numbers) if numbers else None
    return means


def _changes(scores: Mapping[str, float | None], reference: str) -> dict[str, float]:
    """Return the change of each score against the reference's."""
    reference_score = scores.get(reference)
    # Without a score on both sides there is no change, and the sample sorts last.
    if reference_score is None:
        return {}
    others = {name: score for name, score in scores.items() if name != reference and score is not None}
    return {name: _round(score - reference_score) for name, score in others.items()}


def _item(sample: Sample, policies: list[str], reference: str, metric: str) -> Sample:
    """Return a sample for the script: turns, answers, scores by ``metric`` and changes against the reference."""
    columns = _columns(sample, policies)
    responses = {name: sample["responses"].get(name) or [] for name in columns}
    scores = _scores(sample, columns, metric)
    item: Sample = {} if sample.get("columns") is None else {"columns": columns}
    return item | {
        "id": str(sample.get("id", "")),
        "task": _task_of(sample),
        "source": str(sample.get("source", "")),
        "prompt": _turns(sample["prompt"]),
        "answers": {name: [answer_view(response) for response in responses[name]] for name in columns},
        "score": {name: _round(score) for name, score in scores.items()},
        "change": _changes(scores, reference),
    }


def _rollout_item(stage: str, line: Sample) -> dict[str, Any]:
    """Return a response of a stage that trains or samples.

    It has the KL, value and advantage of each token if the line has them. An episode is a conversation (``episode``),
    and 1 in ``s`` marks the tokens that the policy sampled.
    """
    if is_episode(line):
        answer, prompt = _episode_answer(line)
    else:
        answer = answer_view({**line, "text": line["response"]})
        prompt = _turns(line["prompt"])
    tokens = [token for token in (line.get("by_token") or [])[:MAX_TOKENS] if len(token) > len(TOKEN_NUMBERS)]
    if tokens:
        answer["heat"] = {"t": [str(token[0]) for token in tokens]}
        for column, key in enumerate(TOKEN_NUMBERS, start=1):
            answer["heat"][key] = [_hundredths(token[column]) for token in tokens]
        if "episode" in answer and isinstance(line.get("sampled"), list):
            answer["heat"]["s"] = [int(bool(mark)) for mark in line["sampled"][: len(tokens)]]
    return {
        "id": "",
        "task": f"rollouts {stage}",
        "source": str(line["source"]) if "source" in line else f"update {line.get('update', '?')}",
        "prompt": prompt,
        "columns": [stage],
        "answers": {stage: [answer]},
        "score": {stage: _round(line.get("score"))},
        "change": {},
        "weight": 0.0,
    }


def _join_by_prompt(stage: str, items: Sequence[Sample]) -> list[Sample]:
    """Return one item for consecutive items with the same source and prompt, with a column for each response."""
    joined = []
    for _, group in groupby(items, lambda item: (item["source"], item["prompt"])):
        responses = list(group)
        if len(responses) == 1:
            joined += responses
            continue
        names = [f"{stage} {number}" for number in range(1, len(responses) + 1)]
        joined.append(_with_columns(responses, names, stage))
    return joined


def _validation_item(stage: str, number: int, lines: Sequence[Sample]) -> Sample:
    """Return the responses to a held-out prompt, with the update before which each was sampled as its column."""
    items = [_rollout_item(stage, line) for line in lines]
    names = [f"after update {line['update']}" if line["update"] else "before training" for line in lines]
    item = _with_columns(items, names, stage)
    return item | {"task": f"validation {stage}", "source": f"prompt {number}"}


def _with_columns(items: Sequence[Sample], names: Sequence[str], stage: str) -> Sample:
    """Return the first item with the answers and scores of all, in columns called ``names``."""
    return items[0] | {
        "columns": list(names),
        "answers": {name: item["answers"][stage] for name, item in zip(names, items, strict=True)},
        "score": {name: item["score"][stage] for name, item in zip(names, items, strict=True)},
    }


def _episode_answer(line: Sample) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return an episode as an answer, and its prompt; its scores are all that begin with ``score_``."""
    # ``turns`` of an episode is their number, and the text of the last turn is part of the conversation.
    answer = answer_view({name: value for name, value in line.items() if name != "turns"})
    episode = episode_view(line)
    prompt = episode.pop("prompt") or _turns(line["prompt"])
    scores = {str(name): _round(value) for name, value in line.items() if name.startswith(COMPONENT)}
    return answer | {"episode": episode} | ({"scores": scores} if scores else {}), prompt


def _turns(prompt: Any) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": str(turn["role"]), "text": _shorten(str(turn.get("content") or ""))} for turn in turns]


def answer_view(response: Mapping[str, Any]) -> dict[str, Any]:
    answer = {key: _round(response[key]) for key in RESPONSE_FIELDS if response.get(key) is not None}
    answer |= _split(response)
    if response.get("scores"):
        answer["scores"] = {str(name): _round(value) for name, value in response["scores"].items()}
    if response.get("turns"):  # the last turn is the answer itself
        answer["turns"] = [
            {"prompt": _shorten(str(turn.get("prompt", ""))), **_split(turn)} for turn in response["turns"]
        ]
    return answer


def _split(response: Mapping[str, Any]) -> dict[str, str]:
    """Return the ``text`` of a response after its ``thought``, if it has one."""
    text = str(response.get("text", ""))
    end = response.get("thought_end")
    if not isinstance(end, int):
        end = 0
    thought = {"thought": _shorten(text[:end])} if end > 0 else {}
    return {"text": _shorten(text[max(0, end) :]), **thought}


def _first_response(sample: Sample, policy: str) -> Mapping[str, Any]:
    return next(iter(sample["responses"].get(policy) or []), {})


def _has_token_numbers(sample: Sample, policies: Sequence[str]) -> bool:
    return any(_first_response(sample, policy).get("token_kl") for policy in policies)


def _token_numbers(sample: Sample, policies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return numbers by token of each policy's first response: ``t`` texts, ``k`` KL and ``v`` value in hundredths."""
    by_policy = {}
    for policy in policies:
        response = _first_response(sample, policy)
        pairs = (response.get("token_kl") or [])[:MAX_TOKENS]
        if not pairs:
            continue
        numbers = {"t": [str(text) for text, _ in pairs], "k": [_hundredths(kl) for _, kl in pairs]}
        values = response.get("token_value") or []
        if len(values) >= len(pairs):
            numbers["v"] = [_hundredths(value) for value in values[: len(pairs)]]
        by_policy[policy] = numbers
    return by_policy


def _hundredths(value: float | None) -> int | None:
    """Return a number in whole hundredths, which are a third of a float's size as JSON."""
    return None if value is None or not math.isfinite(value) else round(value * HUNDREDTHS)


def _score(response: Mapping[str, Any], metric: str) -> float | None:
    value = response.get(metric)
    if value is None:
        value = (response.get("scores") or {}).get(metric)
    # A broken reward model's score is shown as missing, and makes no change.
    return None if value is None or not math.isfinite(value) else float(value)


def _round(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None


def _shorten(text: str) -> str:
    return cut(text, MAX_TEXT)
