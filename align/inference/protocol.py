"""The protocol of rollout engines: prompts in, sampled responses with their log-probabilities out. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from align.config.runtime import Runtime

if TYPE_CHECKING:
    import torch

    from align.config.base import Precision

Progress = Callable[[int, int], None]
"""Called with (responses finished, responses wanted)."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    """Below 1 the tail is cut and ``logprobs`` are renormalized over what is kept: leave it at 1 for training."""
    n: int = 1
    """Responses per prompt."""
    seed: int = 0
    seeds: tuple[int, ...] | None = None
    """A seed per prompt instead of ``seed`` and its index: its responses are then the same in any list of prompts."""

    def request_seed(self, prompt: int, sample: int) -> int:
        """Return the seed of one response, from ``seed`` and the response's index: batching does not change it."""
        seed, index = self.seed, prompt
        if self.seeds is not None:
            seed, index = self.seeds[prompt], 0
        text = f"{seed}/{index}/{sample}".encode()
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
    weights_update: int | None = None
    """Update whose weights sampled it, where they may change while a session is open; None where they stay."""


@dataclass(frozen=True)
class TurnRequest:
    """One turn of an episode that a session samples."""

    key: int
    """Number of the episode, under which the turn comes back. Of one episode at most one turn is in flight."""
    prompt: list[int]
    """Everything before the turn, earlier turns included."""
    max_tokens: int
    seed: int
    """Seed of the turn's own generator, a non-negative int64 such as ``Sampling.request_seed`` returns."""


@dataclass(frozen=True)
class EngineSpec:
    """Model, settings and limits of an engine."""

    model_dir: Path
    runtime: Runtime
    precision: Precision
    max_length: int
    """Tokens of a prompt and its response together, at most."""
    seed: int


class RolloutEngine(Protocol):
    """vLLM or transformers, in this process or elsewhere. The rest of align does not depend on which."""

    name: str
    dtype: torch.dtype
    """Compute type; the parity probe's tolerance follows from it."""

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, on_progress: Progress | None = None
    ) -> list[list[Response]]:
        """Return ``sampling.n`` responses for each prompt, in the order of ``prompts``."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a full set of weights under their transformers names, and drop every cached prefix.

        ``merged_weights(model)`` of ``align.models.tuning`` gives them. Each tensor has the shape that the checkpoint
        gives its name. Raises ``ValueError`` when one is missing.
        """

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """Return the engine's log-probabilities of response tokens, which the parity probe compares."""

    def close(self) -> None:
        """Free the model and the cache."""


@runtime_checkable
class BatchEngine(Protocol):
    """An engine that samples turns in batches: transformers, or the engines of a Ray cluster."""

    def sample(self, requests: list[TurnRequest], temperature: float, top_p: float) -> list[Response]:
        """Return the responses to ``requests``, in their order; each has its own seed and limit."""
        ...


class Session(Protocol):
    """Turns of many episodes, each sampled as soon as it is submitted. Use a session from one thread.

    ``align.inference.sessions.open_session`` opens one. Between opening and closing it the engine is used for nothing
    else while a turn is in flight. Its weights stay, but for those that a pool of servers was offered.
    """

    is_lockstep: bool
    """True where ``poll`` samples all that was submitted as batches: submit every turn that is ready first."""

    @property
    def pending(self) -> int:
        """Turns that were submitted and have not come back."""
        ...

    def submit(self, request: TurnRequest) -> None:
        """Take a turn. Raises ``ValueError`` for one that cannot be sampled, or whose episode has one in flight."""
        ...

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """Return finished turns by key: waits for the first, and returns none after ``timeout`` seconds.

        Without a turn in flight there is nothing to wait for. A timeout is looked at between two decoding steps.
        """
        ...

    def cache_statistics(self) -> dict[str, float] | None:
        """Return ``prefix_hit_rate``, the share of prompt tokens that was in the engine's cache.

        Counts the turns that came back. None where the engine has no such cache or does not tell.
        """
        ...

    def close(self) -> None:
        """Abort what is in flight, and let the engine sleep where it does after ``generate``."""
        ...


def check_idle(session: Session | None, call: str) -> None:
    """Raise ``RuntimeError`` where an engine is called while its open session has turns in flight."""
    if session is not None and session.pending:
        raise RuntimeError(f"'{call}' was called while {session.pending} turns of a session are in flight")
