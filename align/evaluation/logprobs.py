"""Log-probabilities of given tokens under a checkpoint, and the sequence KL of two checkpoints.

They come from the trainer's forward pass, never from the engine: the two round differently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import Any

from align.config.batch_sizes import READ_TOKENS

HEAD_ROWS = 256
"""Positions whose logits are converted to float32 at a time."""


def response_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float,
    precision: Any,
    pad: int,
) -> list[list[float]]:
    """Log-probability of each response token under ``softmax(logits / temperature)``, in nats; one list per response.

    A prompt that several responses share is read once for as many of them as ``READ_TOKENS`` allows, where the model
    supports it (``align.models.fast.ragged_rows``): the choices of a question, samples of one prompt, both sides of a
    pair.
    """
    import torch

    from align.models.fast.ragged_rows import NotRaggedError
    from align.models.precision import autocast

    device = next(model.parameters()).device
    reading = _Reading(model, prompts, responses, temperature, pad, [[] for _ in prompts])
    # Responses that share a prompt form a tree, which is read in one sequence with the prompt once.
    trees = _trees(prompts, responses)
    if trees and not _can_share(model):
        trees = []
    with torch.no_grad(), autocast(device, precision):
        try:
            for batch in _tree_batches(trees):
                # First the trees. A model that turns out not to support them falls back to plain rows.
                _read_trees(reading, batch)
        except NotRaggedError:
            trees = []  # everything is read row by row below
        in_trees = {index for tree in trees for index in tree.members}
        remaining = [index for index in range(len(prompts)) if index not in in_trees]
        lengths = {index: len(prompts[index]) + len(responses[index]) for index in remaining}
        for indices in _batches(lengths):
            _read_rows(reading, indices)
    return reading.logprobs


@dataclass(frozen=True)
class _Reading:
    """The inputs of :func:`response_logprobs`, and its result so far."""

    model: Any
    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    temperature: float
    pad: int
    logprobs: list[list[float]]
    """Per response; empty until it was read."""


def _can_share(model: Any) -> bool:
    """Prepare the model to read responses to one prompt in one sequence; return False where it cannot."""
    from align.models.fast.ragged_rows import can_run_ragged, enable_ragged

    parameters = signature(model.forward).parameters.values()
    takes_keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not takes_keywords or not can_run_ragged(model):
        return False
    enable_ragged(model)
    return True


def _read_rows(reading: _Reading, batch: Sequence[int]) -> None:
    """Fill ``logprobs`` for the rows of ``batch``, each with its prompt, padded to one length."""
    import torch

    model, prompts, responses = reading.model, reading.prompts, reading.responses
    device = next(model.parameters()).device
    lengths = {index: len(prompts[index]) + len(responses[index]) for index in batch}
    width = max(lengths.values())
    ids = torch.full((len(batch), width), reading.pad, device=device)  # (B, T), right-padded
    mask = torch.zeros((len(batch), width), dtype=torch.long, device=device)
    wanted = torch.zeros((len(batch), width), dtype=torch.bool, device=device)  # positions of response tokens
    for row, index in enumerate(batch):
        ids[row, : lengths[index]] = torch.tensor([*prompts[index], *responses[index]], device=device)
        mask[row, : lengths[index]] = 1
        wanted[row, len(prompts[index]) : lengths[index]] = True
    # The token at t is predicted from position t - 1. The model's own head runs, with any scaling or capping it has,
    # but only from the first position that is needed.
    start = min(len(prompts[index]) for index in batch) - 1
    keep = torch.arange(start, width - 1, device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
    targets = wanted[:, start + 1 :]
    flat = iter(_chosen_logprobs(logits[targets], ids[:, start + 1 :][targets], reading.temperature))
    for index in batch:
        reading.logprobs[index] = list(islice(flat, len(responses[index])))


@dataclass(frozen=True)
class _Tree:
    """Responses to one prompt that are read in one sequence: the prompt, then each response without its last token."""

    members: list[int]
    length: int


def _trees(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[_Tree]:
    """Group responses that share a prompt, at least two per tree, with at most ``READ_TOKENS`` tokens."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        if responses[index]:
            groups.setdefault(tuple(prompt), []).append(index)
    trees = []
    for prompt, indices in groups.items():
        members = [indices[0]]
        # A response's last token is only predicted, never read, so it takes no room.
        length = len(prompt) + len(responses[indices[0]]) - 1
        for index in indices[1:]:
            added = len(responses[index]) - 1
            if length + added > READ_TOKENS:
                trees.append(_Tree(members, length))
                members = []
                length = len(prompt)
            members.append(index)
            length += added
        trees.append(_Tree(members, length))
    return [tree for tree in trees if len(tree.members) > 1]


def _tree_batches(trees: Sequence[_Tree]) -> Iterator[list[_Tree]]:
    """Yield batches of trees of similar length, at most ``READ_TOKENS`` each."""
    batch: list[_Tree] = []
    for tree in sorted(trees, key=lambda tree: -tree.length):
        if batch and sum(member.length for member in batch) + tree.length > READ_TOKENS:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def _read_trees(reading: _Reading, trees: Sequence[_Tree]) -> None:
    """Fill ``logprobs`` for the members of ``trees``: each response attends to the prompt and itself, as if alone."""
    import torch

    from align.models.fast.prefix_batch import PrefixBatch
    from align.models.fast.ragged_rows import to_device

    model, prompts, responses = reading.model, reading.prompts, reading.responses
    device = next(model.parameters()).device
    line = PrefixBatch()
    keep: list[int] = []  # positions whose logits predict a response token
    rows: list[int] = []  # for each response token, the index in ``keep`` of the position that predicts it
    for tree in trees:
        prompt = line.add(prompts[tree.members[0]])
        # The prompt's last token predicts the first token of every response.
        last = len(keep)
        keep.append(len(line.tokens) - 1)
        for index in tree.members:
            # A response's last token is only a target, never an input.
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
    flat = iter(_chosen_logprobs(logits, targets, reading.temperature, torch.tensor(rows, device=device)))
    for index in members:
        reading.logprobs[index] = list(islice(flat, len(responses[index])))


def sequence_kl(logprobs: Sequence[float], ref_logprobs: Sequence[float]) -> tuple[float, float]:
    """Estimate KL(policy || reference) from one response of the policy, in nats: k1 and k3, of (T,) log-probabilities.

    k1 = sum(log p - log q) is unbiased; k3 = sum(q/p - 1 - log(q/p)) is never negative and varies less
    (Schulman 2020, "Approximating KL divergence").
    """
    ratios = [ref_logprob - logprob for logprob, ref_logprob in zip(logprobs, ref_logprobs, strict=True)]
    return -math.fsum(ratios), math.fsum(math.expm1(ratio) - ratio for ratio in ratios)


def _chosen_logprobs(logits: Any, targets: Any, temperature: float, rows: Any = None) -> list[float]:
    """Log-probability of each of the (N,) ``targets``; the softmax is taken in float32.

    Target i is predicted by row i of the (N, V) logits, or by row ``rows[i]`` of (M, V) ones.
    """
    import torch

    values: list[float] = []
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    # In blocks: float32 logits of all positions at once would not fit in memory.
    for row_block, target_block in zip(rows.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        scaled = logits[row_block].float() / temperature
        values += (scaled.gather(1, target_block[:, None])[:, 0] - scaled.logsumexp(dim=-1)).tolist()
    return values


def _batches(lengths: Mapping[int, int]) -> Iterator[list[int]]:
    """Yield indices grouped by length, at most ``READ_TOKENS`` tokens with padding per batch (or one long row)."""
    batch: list[int] = []
    for index in sorted(lengths, key=lambda i: -lengths[i]):
        # The first row is the longest, so it sets the width that all rows are padded to.
        if batch and (len(batch) + 1) * lengths[batch[0]] > READ_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
