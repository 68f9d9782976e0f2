"""An engine within training: the parity probe, and the division of calls among a stage's processes and servers.

An engine inside a process works for that process. Servers are called by the stage's first process, for all of them.

The engine samples a few responses with their log-probabilities; the trainer's model scores the same tokens. Different
kernels and bfloat16 make small differences. Stale weights, an unsynced head, another temperature or template make
large ones, and PPO would learn from them without complaint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from align.config.runtime.launch import rank
from align.inference.protocol import RolloutEngine, Sampling
from align.inference.servers.pool import PoolEngine
from align.inference.weights import AdaptedWeights, Weights
from align.models.compute.processes import rank_range
from align.models.experts import has_experts, router_disagreement, token_experts
from align.models.tuning.peft_layers import (
    adapter_tensors,
    frozen_weights,
    is_low_rank,
    is_trained_rows,
    merged_weights,
    tuner_layers,
)

Result = TypeVar("Result")


class RemoteRankEngine:
    """Placeholder for the pool in a stage's other processes; the first one calls the servers for them."""

    name = PoolEngine.name

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def generate(self, *_: Any, **__: Any) -> Any:
        """Refuse: only the first process may call servers."""
        raise RuntimeError("only the stage's first process calls the servers of runtime.rollouts")

    sample = score_tokens = generate

    def load_weights(self, weights: Weights) -> None:
        """Do nothing with weights of any shape: the first process gives the servers theirs."""

    def close(self) -> None:
        """Do nothing: this process holds no engine."""


def policy_weights(model: PreTrainedModel | PeftModel) -> Weights:
    """Return a live policy's weights for ``load_weights``: base and adapter for plain LoRA on matrices, else merged.

    Rows and modules that are trained in full are part of the adapter. The tensors are the model's own where possible.
    """
    layers = tuner_layers(model).values()
    if not any(map(is_low_rank, layers)) or not all(is_low_rank(layer) or is_trained_rows(layer) for layer in layers):
        return merged_weights(model)
    return AdaptedWeights(model, lambda: frozen_weights(model), adapter_tensors(model))


def is_shared(engine: Any) -> bool:
    """Return True when the first process calls the engine for all."""
    return isinstance(engine, PoolEngine | RemoteRankEngine)


def part_for(engine: Any, count: int) -> range:
    """Return the range of ``count`` prompts for which this process calls ``engine``."""
    if is_shared(engine):
        return range(count if rank() == 0 else 0)
    return rank_range(count)


def ask_each(engine: RolloutEngine, action: Callable[[RolloutEngine], Result]) -> list[Result]:
    """Return the results of ``action`` for every server of a pool, or for the engine itself."""
    if isinstance(engine, RemoteRankEngine):
        return []
    if isinstance(engine, PoolEngine):
        return engine.ask_each(action)
    return [action(engine)]


def returns(engine: RolloutEngine) -> int:
    """Return how often a server of a pool came back; 0 for any other engine."""
    return engine.returns if isinstance(engine, PoolEngine) else 0


PROBE_TOKENS = 16
"""Tokens of a response that are compared, unless the run's are shorter."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Largest mean |difference| in nats per token, by the less exact of the two types.

Measured on SmolLM2-135M at temperature 1: float32 7e-6, bfloat16 0.05 without bias (mean -0.003); a head that was not
synced after a few updates gives 0.7.
"""


class ParityError(RuntimeError):
    """The engine's log-probabilities differ from the log-probabilities of the trained model."""


@dataclass(frozen=True)
class Parity:
    """Result of a probe. ``mean_gap`` and ``max_gap`` are |engine - trainer| in nats per token.

    ``router_disagreement`` is the share of choices, of a token in a layer, with other experts; None without experts.
    """

    tokens: int
    mean_gap: float
    max_gap: float
    tolerance: float
    router_disagreement: float | None = None


def probe(
    engine: RolloutEngine,
    model: nn.Module,
    prompts: list[list[int]],
    *,
    temperature: float = 1.0,
    max_tokens: int = PROBE_TOKENS,
    seed: int = 0,
) -> Parity:
    """Compare ``engine`` with ``model`` (the live policy) on its own responses to ``prompts``, token ids.

    Raises ``ParityError`` with the likely causes when the mean gap is above the tolerance, or a value is not finite.
    The model's mode, gradients and the caller's randomness are left as they were.
    """
    # The engine reports log-probabilities of its own tokens while it samples, as in a rollout. Score the same tokens
    # here.
    samples = engine.generate(prompts, Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed))
    responses = [row[0] for row in samples]
    # Log-probabilities of all response tokens of all rows, one after another: (N,).
    logprobs = trainer_logprobs(model, prompts, [response.token_ids for response in responses], temperature)
    sampler_logprobs = torch.tensor([value for response in responses for value in response.logprobs])
    gap = (sampler_logprobs - logprobs).abs()
    rows = [[*prompt, *response.token_ids] for prompt, response in zip(prompts, responses, strict=True)]
    disagreement = compare_experts(engine, model, rows)
    parity = Parity(len(gap), float(gap.mean()), float(gap.max()), tolerance_of(engine, model), disagreement)
    if not gap.isfinite().all() or parity.mean_gap > parity.tolerance:
        raise ParityError(explain(engine.name, parity, sampler_logprobs, logprobs))
    return parity


def compare_experts(engine: Any, model: nn.Module, rows: list[list[int]]) -> float | None:
    """Return the share of choices with other experts in the engine than in ``model``.

    None for a model without experts and for an engine that cannot be observed, such as a server.
    """
    if not has_experts(model.config) or not hasattr(engine, "token_experts"):
        return None
    theirs = engine.token_experts(rows)
    training = model.training
    model.eval()
    ours = token_experts(model, rows)
    model.train(training)
    return None if theirs is None else router_disagreement(theirs, ours)


def tolerance_of(engine: Any, model: nn.Module) -> float:
    """Return the tolerance of the least exact type among the engine's, the model's and an active autocast's."""
    device = next(model.parameters()).device.type
    types = {getattr(engine, "dtype", torch.float32), next(model.parameters()).dtype}
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    return max(TOLERANCE.get(kind, TOLERANCE[torch.float32]) for kind in types)


@torch.no_grad()
def trainer_logprobs(
    model: nn.Module, prompts: list[list[int]], responses: list[list[int]], temperature: float
) -> torch.Tensor:
    """Return the log-probabilities (N,) of all N response tokens, one after another, in float32.

    Rows are scored one at a time, so there is no padding.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    logprobs = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response]], device=device)
        # The logits at a token predict the next token, so they begin at the last token of the prompt.
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()  # (T, V)
        # At temperature 0 the engines report log-probabilities of the unscaled logits.
        scores = (logits / (temperature or 1.0)).log_softmax(dim=-1)
        logprobs.append(scores.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu())
    model.train(training)
    return torch.cat(logprobs)


def explain(name: str, parity: Parity, sampler_logprobs: torch.Tensor, logprobs: torch.Tensor) -> str:
    """Return the message for a failed probe, from log-probabilities (N,): the gap, the tolerance, likely causes."""
    bias = float((sampler_logprobs - logprobs).mean())
    return (
        f"the {name} engine and the trainer do not hold the same model: their log-probabilities differ by "
        f"{parity.mean_gap:.4f} nats per token on average (largest {parity.max_gap:.3f}, engine minus trainer "
        f"{bias:+.4f}) over {parity.tokens} tokens; at most {parity.tolerance:g} was expected. Likely causes, the "
        "first one first: weights not loaded into the engine since the last update, or not all of them (a tied output "
        "head, a LoRA delta); another temperature or a top_p below 1 on one side; dropout left on in the trainer; an "
        "engine computing in a lower precision (runtime.engine.dtype: float32 tells)."
    )
