"""What a rollout engine is: prompts in, sampled responses with their log-probabilities out. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""Called with (responses finished, responses wanted)."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    """Below 1 the tail is cut and ``logprobs`` are renormalized over what is kept: leave it at 1 for training."""
    n: int = 1
    """Responses per prompt."""
    seed: int = 0
    seeds: tuple[int, ...] | None = None
    """A seed for each prompt instead of ``seed`` and its place, so that it is answered alike in any company."""

    def request_seed(self, prompt: int, sample: int) -> int:
        """Seed of one response, from this sampling's seed and the response's place: batching does not change it."""
        seed, place = (self.seed, prompt) if self.seeds is None else (self.seeds[prompt], 0)
        text = f"{seed}/{place}/{sample}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1  # non-negative int64


@dataclass(frozen=True)
class Response:
    """One sampled response."""

    token_ids: list[int]
    """Sampled tokens, the end-of-turn token included when there is one."""
    logprobs: list[float]
    """The engine's log-probability of each token, after temperature (``sampler_logprobs``)."""
    finished: bool
    """True when the end-of-turn token was sampled, False when the length limit cut it off."""
    text: str
    """The tokens decoded, special ones left out."""


class RolloutEngine(Protocol):
    """vLLM or transformers; the rest of align does not ask which."""

    name: str
    dtype: torch.dtype
    """Type it computes in; the parity probe's tolerance follows from it."""

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """``sampling.n`` responses for each prompt, in the order of ``prompts``."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the full set of weights under their transformers names, and forget every cached prefix.

        ``align.models.merging.merged_weights(model)`` gives them. Raises ``ValueError`` when one is missing.
        """

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """The engine's own log-probabilities of given response tokens: what the parity probe compares."""

    def close(self) -> None:
        """Free the model and the cache."""
