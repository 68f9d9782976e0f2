"""The metrics of the prompt set, as a scorecard describes them; a task describes its own. Torch-free."""

from __future__ import annotations

from typing import Any

METRICS: dict[str, dict[str, Any]] = {
    "gold": {
        "title": "Gold score",
        "better": "higher",
        "unit": "0 to 1",
        "meaning": "what a program that checks the response gives it",
        "task": "prompts",
    },
    "reward": {
        "title": "Reward-model score",
        "better": "higher",
        "unit": "score",
        "meaning": "the learned proxy; only differences mean something",
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
