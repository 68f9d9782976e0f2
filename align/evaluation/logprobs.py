"""What a checkpoint itself thinks of given tokens: sequence KL to a reference, and loss on held-out answers.

The trainer's own forward pass, never the engine's log-probabilities: the two round differently. Leaves out sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

BATCH_TOKENS = 2048
"""Tokens, padding included, in one forward pass."""
HEAD_ROWS = 256
"""Positions whose logits are in float32 at a time."""


def response_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float,
    precision: Any,
    pad: int,
) -> list[list[float]]:
    """Log-probability of each response token under ``softmax(logits / temperature)``, in nats; one list a response."""
    import torch

    from align.models.precision import autocast

    device = next(model.parameters()).device
    found: list[list[float]] = [[] for _ in prompts]
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    with torch.no_grad(), autocast(device, precision):
        for batch in _batches(lengths):
            width = max(lengths[index] for index in batch)
            ids = torch.full((len(batch), width), pad, device=device)  # (B, T), right-padded
            mask = torch.zeros((len(batch), width), dtype=torch.long, device=device)
            wanted = torch.zeros((len(batch), width), dtype=torch.bool, device=device)  # positions of response tokens
            for row, index in enumerate(batch):
                ids[row, : lengths[index]] = torch.tensor([*prompts[index], *responses[index]], device=device)
                mask[row, : lengths[index]] = 1
                wanted[row, len(prompts[index]) : lengths[index]] = True
            # The token at t is predicted from position t - 1. The model's own head runs, whatever scaling or capping it
            # has, but only from the first position that is needed.
            start = min(len(prompts[index]) for index in batch) - 1
            keep = torch.arange(start, width - 1, device=device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
            asked = wanted[:, start + 1 :]
            flat = _chosen_logprobs(logits[asked], ids[:, start + 1 :][asked], temperature)
            at = 0
            for index in batch:
                found[index] = flat[at : at + len(responses[index])]
                at += len(responses[index])
    return found


def sequence_kl(logprobs: Sequence[float], ref_logprobs: Sequence[float]) -> tuple[float, float]:
    """KL(policy || reference) of one response that the policy sampled, in nats: the k1 and the k3 estimate.

    k1 = sum(log p - log q) is unbiased; k3 = sum(q/p - 1 - log(q/p)) is never negative and varies less
    (Schulman 2020, "Approximating KL divergence").
    """
    ratios = [ref - own for own, ref in zip(logprobs, ref_logprobs, strict=True)]
    return -math.fsum(ratios), math.fsum(math.expm1(ratio) - ratio for ratio in ratios)


def _chosen_logprobs(logits: Any, targets: Any, temperature: float) -> list[float]:
    """Log-probability of each of the (N,) ``targets`` from (N, V) logits; the softmax is taken in float32."""
    values: list[float] = []
    for rows, chosen in zip(logits.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        scaled = rows.float() / temperature
        values += (scaled.gather(1, chosen[:, None])[:, 0] - scaled.logsumexp(dim=-1)).tolist()
    return values


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices grouped by length, each batch at most ``BATCH_TOKENS`` with its padding (or one long row)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
