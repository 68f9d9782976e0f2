"""Metrics of the prompt set, as the scorecard describes them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ProgramDescription = tuple[str | None, str]
"""Direction of a program's metric (``higher``, ``lower``, None for a metric that only informs), and its meaning."""
PROMPT_SET_METRICS: dict[str, dict[str, Any]] = {
    "reward": {
        "title": "Reward-model score",
        "better": "higher",
        "unit": "score",
        "meaning": "score by the learned proxy; only differences are meaningful",
        "task": "prompts",
    },
    "finished": {
        "title": "Ends by itself",
        "better": "higher",
        "unit": "share",
        "meaning": "share of responses that end with the end-of-turn token rather than at the token limit",
        "task": "prompts",
    },
    "length": {
        "title": "Response length",
        "better": None,
        "unit": "tokens",
        "meaning": "tokens of a response, its end-of-turn token included",
        "task": "prompts",
    },
    "kl": {
        "title": "KL to reference",
        "better": None,
        "unit": "nats",
        "meaning": "drift from the reference over a whole response, unbiased k1 estimate on the policy's own samples",
        "task": "prompts",
    },
    "kl_k3": {
        "title": "KL to reference (k3)",
        "better": None,
        "unit": "nats",
        "meaning": "the same by the k3 estimate, never negative",
        "task": "prompts",
    },
    "heldout_loss": {
        "title": "Held-out SFT loss",
        "better": "lower",
        "unit": "nats per token",
        "meaning": "negative log-likelihood per token of held-out reference answers",
        "task": "prompts",
    },
}
"""Metrics of the prompt set beside those of programs; a task describes its own."""


def program_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return the scores of the prompt set that programs compute, in order; each is called what its function is."""
    return [
        name
        for name, entry in metrics.items()
        if entry["task"] == "prompts" and name not in PROMPT_SET_METRICS and entry["better"] is not None
    ]


def program_entry(name: str, better: str | None, meaning: str) -> dict[str, Any]:
    """Return the description of a program's metric, which is called ``name``."""
    return {"title": name, "better": better, "unit": "score", "meaning": meaning, "task": "prompts"}
