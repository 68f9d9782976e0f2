"""The maths of merging, one tensor of all models at a time, in float32, without files.

A *task vector* is a model's tensor minus the base's (arXiv 2212.04089). TIES and DARE are peft's own functions; linear
averages, SLERP and WARP are here. Left out: merges that need data or gradients (Fisher, RegMean).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from peft.utils import merge_utils

Tensor = torch.Tensor

PARALLEL = 1e-4
"""Sine of an angle below which two vectors count as parallel and are interpolated along a straight line."""


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of tensors of one shape; with weights that sum to 1 a model soup (arXiv 2203.05482)."""
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Interpolate from ``a`` (share 0) to ``b`` (share 1) along the great circle, the whole tensor as one vector.

    sin((1 - t) W) / sin W * a + sin(t W) / sin W * b, with W the angle between them (Shoemake 1985). Zero or parallel
    tensors are interpolated along a straight line. Both have one shape.
    """
    start, end = a.float(), b.float()
    norms = start.norm() * end.norm()
    # A zero tensor has no direction, and so no angle.
    if norms == 0:
        return torch.lerp(start, end, share)
    cosine = ((start * end).sum() / norms).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    if sine < PARALLEL:
        return torch.lerp(start, end, share)
    result: Tensor = torch.sin((1 - share) * angle) / sine * start + torch.sin(share * angle) / sine * end
    return result


def warp(task_vectors: Sequence[Tensor]) -> Tensor:
    """SLERP of any number of task vectors (WARP, arXiv 2406.16768): the m-th is added with share 1 / m.

    With more than two the order makes a small difference, as in the paper.
    """
    merged = task_vectors[0].float()
    for count, vector in enumerate(task_vectors[1:], start=2):
        merged = slerp(merged, vector, 1 / count)
    return merged


def ties(task_vectors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES: keep the largest entries of each, elect a sign per entry, average those that agree (arXiv 2306.01708)."""
    if density >= 1:
        stacked = torch.stack([vector.float() for vector in task_vectors])
        # With density 1 nothing is trimmed, so only the sign election and the disjoint merge remain.
        mask = merge_utils.calculate_majority_sign_mask(stacked)
        return merge_utils.disjoint_merge(stacked * _shaped(weights, stacked), mask)
    vectors = [vector.float() for vector in task_vectors]
    return merge_utils.ties(vectors, torch.tensor(list(weights)), density)


def dare(task_vectors: Sequence[Tensor], weights: Sequence[float], density: float, seed: int, elect: bool) -> Tensor:
    """DARE: drop random entries, scale up the rest (arXiv 2311.03099), then add them, or merge them as TIES does."""
    if density >= 1:
        return ties(task_vectors, weights, 1.0) if elect else linear(task_vectors, weights)
    vectors = [vector.float() for vector in task_vectors]
    with torch.random.fork_rng(devices=[]):
        # peft draws the dropped entries from torch's global generator.
        torch.manual_seed(seed)
        merge = merge_utils.dare_ties if elect else merge_utils.dare_linear
        return merge(vectors, torch.tensor(list(weights)), density)


def seed_of(seed: int, name: str) -> int:
    """Return a seed for the tensor ``name``, so that results do not depend on the order of tensors."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])


def _shaped(weights: Sequence[float], stacked: Tensor) -> Tensor:
    return torch.tensor(list(weights)).view(-1, *[1] * (stacked.dim() - 1))
