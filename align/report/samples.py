"""Side-by-side samples for the page's script: read, bounded in size, sorted by score change. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 8_000_000
"""Text on the page; beyond it the prompts with the smallest score changes are left out, and counted."""
MAX_TEXT = 6_000
"""Characters of one response or turn on the page."""

Sample = dict[str, Any]


def read_samples(path: Path) -> list[Sample]:
    """Lines of a ``samples.jsonl``; a missing file is an empty list."""
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        return []


def for_page(samples: list[Sample], card: dict[str, Any] | None) -> dict[str, Any]:
    """What the page's script shows: ``policies``, ``reference``, ``metric``, ``items``, ``left_out``.

    An item has ``prompt`` turns, ``source``, per policy its ``answers`` and mean ``score``, and ``change`` per policy
    against the reference. The items with the largest change come first.
    """
    policies = list(card["policies"]) if card else sorted({name for one in samples for name in one["responses"]})
    reference = str(card["reference"]) if card else (policies[0] if policies else "")
    metric = str(card["primary"]) if card else "gold"
    metric = metric if metric in ("gold", "reward") else "gold"
    items = [_item(sample, policies, reference, metric) for sample in samples]
    items.sort(key=lambda item: -max((abs(change) for change in item["change"].values()), default=0.0))
    shown, used = [], 0
    for item in items:
        used += len(json.dumps(item))
        if used > MAX_BYTES:
            break
        shown.append(item)
    return {
        "policies": policies,
        "reference": reference,
        "metric": metric,
        "items": shown,
        "left_out": len(items) - len(shown),
    }


def lengths(samples: list[Sample], policies: list[str]) -> dict[str, list[int]]:
    """Response lengths in tokens of each policy, over prompts and samples."""
    return {
        policy: [one["tokens"] for sample in samples for one in sample["responses"].get(policy, [])]
        for policy in policies
    }


def _item(sample: Sample, policies: list[str], reference: str, metric: str) -> dict[str, Any]:
    answers = {policy: sample["responses"].get(policy, []) for policy in policies}
    scores = {policy: _mean([one.get(metric) for one in answers[policy]]) for policy in policies}
    start = scores.get(reference)
    return {
        "id": str(sample.get("id", "")),
        "source": str(sample.get("source", "")),
        "prompt": [{"role": str(turn["role"]), "text": _cut(str(turn["content"]))} for turn in sample["prompt"]],
        "answers": {
            policy: [
                {key: one.get(key) for key in ("tokens", "finished", "gold", "reward", "kl")}
                | {"text": _cut(str(one["text"]))}
                for one in answers[policy]
            ]
            for policy in policies
        },
        "score": scores,
        "change": {
            policy: score - start
            for policy, score in scores.items()
            if policy != reference and score is not None and start is not None
        },
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text) - MAX_TEXT:,} more characters)"
