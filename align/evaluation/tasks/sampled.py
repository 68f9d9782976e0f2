"""How answers of a benchmark are sampled: its settings, and what to count about the answers. Torch-free."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from align.config.base import Config
from align.evaluation.tasks.base import Answers
from align.inference.protocol import Sampling


class Sampled(Config):
    """Fields of a task that has answers sampled; a task's config inherits them beside ``TaskConfig``."""

    max_tokens: int = Field(512, ge=1)
    """Longest answer; what is longer is cut off there, and judged by what there is."""
    temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest token, as the published numbers do; above 0 answers are drawn by the run's seed."""
    samples: int = Field(1, ge=1)
    """Answers to each item, averaged; more than one needs a temperature above 0."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 are one and the same answer at temperature 0; raise it or drop samples")
        return self

    def sampling(self, seed: int) -> Sampling:
        """The settings for an engine."""
        return Sampling(self.max_tokens, self.temperature, n=self.samples, seed=seed)

    def sampling_settings(self, seed: int) -> dict[str, Any]:
        """JSON-able, for the reader who repeats it."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "samples": self.samples, "seed": seed}


def answer_counts(answers: Answers) -> dict[str, int]:
    """How many answers there are, and how many of them were cut off at ``max_tokens`` or hold nothing but space."""
    responses = [turns[-1].response for samples in answers for turns in samples]
    return {
        "answers": len(responses),
        "cut_off": sum(not response.finished for response in responses),
        "empty": sum(not response.text.strip() for response in responses),
    }
