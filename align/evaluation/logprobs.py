"""What a checkpoint itself thinks of given tokens: sequence KL to a reference, and loss on held-out answers.

The trainer's own forward pass, never the engine's log-probabilities: the two round differently. Leaves out sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import islice
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
    """Log-probability of each response token under ``softmax(logits / temperature)``, in nats; one list a response.

    A prompt that several responses share is read once for as many of them as ``BATCH_TOKENS`` allows, where the model
    can (``align.models.fast.ragged_rows``): the choices of a question, samples of one prompt, chosen and rejected.
    """
    import torch

    from align.models.fast.ragged_rows import NotRaggedError
    from align.models.precision import autocast

    device = next(model.parameters()).device
    found: list[list[float]] = [[] for _ in prompts]
    trees = _trees(prompts, responses)
    if trees and not _can_share(model):
        trees = []
    with torch.no_grad(), autocast(device, precision):
        try:
            for some in _tree_batches(trees):
                _read_trees(model, some, prompts, responses, temperature, found)
        except NotRaggedError:
            trees = []
        together = {index for tree in trees for index in tree.members}
        alone = [index for index in range(len(prompts)) if index not in together]
        lengths = {index: len(prompts[index]) + len(responses[index]) for index in alone}
        for batch in _batches(lengths):
            _read_rows(model, batch, prompts, responses, temperature, pad, found)
    return found


def _can_share(model: Any) -> bool:
    """Whether responses to one prompt can be read in one sequence; readies the model for it."""
    from align.models.fast.ragged_rows import can_run_ragged, run_ragged

    takes_more = any(each.kind is each.VAR_KEYWORD for each in signature(model.forward).parameters.values())
    if not takes_more or not can_run_ragged(model):
        return False
    run_ragged(model)
    return True


def _read_rows(
    model: Any,
    batch: Sequence[int],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    temperature: float,
    pad: int,
    found: list[list[float]],
) -> None:
    """Fill ``found`` for the rows of ``batch``, each with its prompt, padded to one length."""
    import torch

    device = next(model.parameters()).device
    lengths = {index: len(prompts[index]) + len(responses[index]) for index in batch}
    width = max(lengths.values())
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


@dataclass(frozen=True)
class _Tree:
    """Responses to one prompt that are read in one sequence: the prompt, and behind it each without its last token."""

    members: list[int]
    length: int


def _trees(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[_Tree]:
    """Responses that share a prompt, at least two together, ``BATCH_TOKENS`` with it at most."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        if responses[index]:
            groups.setdefault(tuple(prompt), []).append(index)
    found = []
    for prompt, indices in groups.items():
        members, length = [indices[0]], len(prompt) + len(responses[indices[0]]) - 1
        for index in indices[1:]:
            more = len(responses[index]) - 1
            if length + more > BATCH_TOKENS:
                found.append(_Tree(members, length))
                members, length = [], len(prompt)
            members.append(index)
            length += more
        found.append(_Tree(members, length))
    return [tree for tree in found if len(tree.members) > 1]


def _tree_batches(trees: Sequence[_Tree]) -> Iterator[list[_Tree]]:
    """Trees of like length, ``BATCH_TOKENS`` at a time."""
    batch: list[_Tree] = []
    for tree in sorted(trees, key=lambda tree: -tree.length):
        if batch and sum(one.length for one in batch) + tree.length > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def _read_trees(
    model: Any,
    trees: Sequence[_Tree],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    temperature: float,
    found: list[list[float]],
) -> None:
    """Fill ``found`` for the members of ``trees``: each response sees the prompt and itself, as if it stood alone."""
    import torch

    from align.models.fast.prefix_batch import Line
    from align.models.fast.ragged_rows import to_device

    device = next(model.parameters()).device
    line = Line()
    keep: list[int] = []  # tokens from which something is predicted
    rows: list[int] = []  # for each response token, which of ``keep`` predicts it
    for tree in trees:
        prompt = line.add(prompts[tree.members[0]])
        last = len(keep)
        keep.append(len(line.tokens) - 1)
        for index in tree.members:
            inputs = responses[index][:-1]
            rows += [last, *range(len(keep), len(keep) + len(inputs))]
            if inputs:
                start = line.starts[line.add(inputs, prompt)]
                keep += range(start, start + len(inputs))
    batch = line.batch()
    logits = model(
        input_ids=batch["input_ids"].to(device),
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),  # as ragged.hidden_states
        position_ids=batch["position_ids"].to(device),
        use_cache=False,
        layout=to_device(batch["layout"], device),
        logits_to_keep=torch.tensor(keep, device=device),
    ).logits[0]  # (N, V)
    members = [index for tree in trees for index in tree.members]
    targets = torch.tensor([token for index in members for token in responses[index]], device=device)
    flat = iter(_chosen_logprobs(logits, targets, temperature, torch.tensor(rows, device=device)))
    for index in members:
        found[index] = list(islice(flat, len(responses[index])))


def sequence_kl(logprobs: Sequence[float], ref_logprobs: Sequence[float]) -> tuple[float, float]:
    """KL(policy || reference) of one response that the policy sampled, in nats: the k1 and the k3 estimate.

    k1 = sum(log p - log q) is unbiased; k3 = sum(q/p - 1 - log(q/p)) is never negative and varies less
    (Schulman 2020, "Approximating KL divergence").
    """
    ratios = [ref - own for own, ref in zip(logprobs, ref_logprobs, strict=True)]
    return -math.fsum(ratios), math.fsum(math.expm1(ratio) - ratio for ratio in ratios)


def _chosen_logprobs(logits: Any, targets: Any, temperature: float, rows: Any = None) -> list[float]:
    """Log-probability of each of the (N,) ``targets``; the softmax is taken in float32.

    Target i is predicted by row i of the (N, V) logits, or by row ``rows[i]`` of (M, V) ones.
    """
    import torch

    values: list[float] = []
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    for some, chosen in zip(rows.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        scaled = logits[some].float() / temperature
        values += (scaled.gather(1, chosen[:, None])[:, 0] - scaled.logsumexp(dim=-1)).tolist()
    return values


def _batches(lengths: Mapping[int, int]) -> Iterator[list[int]]:
    """Indices grouped by length, each batch at most ``BATCH_TOKENS`` with its padding (or one long row)."""
    batch: list[int] = []
    for index in sorted(lengths, key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
