"""The maths of merging, one tensor of all models at a time, in float32. Knows no files.

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
"""Sine of an angle below which two vectors have no plane of their own, and a straight line is taken."""


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum; a model soup (arXiv 2203.05482) with weights that sum to 1."""
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """From ``one`` (share 0) to ``other`` (1) along the great circle, the whole tensor as one vector.

    sin((1 - t) W) / sin W * one + sin(t W) / sin W * other, with W the angle between them (Shoemake 1985). Where one of
    them is zero or they are parallel, the straight line.
    """
    first, second = one.float(), other.float()
    norms = first.norm() * second.norm()
    if norms == 0:
        return torch.lerp(first, second, share)
    cosine = ((first * second).sum() / norms).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    if sine < PARALLEL:
        return torch.lerp(first, second, share)
    result: Tensor = torch.sin((1 - share) * angle) / sine * first + torch.sin(share * angle) / sine * second
    return result


def warp(task_vectors: Sequence[Tensor]) -> Tensor:
    """SLERP of any number of task vectors (WARP, arXiv 2406.16768): the m-th joins those before it with share 1 / m.

    Beyond two the order makes a small difference, as the paper's does.
    """
    merged = task_vectors[0].float()
    for count, vector in enumerate(task_vectors[1:], start=2):
        merged = slerp(merged, vector, 1 / count)
    return merged


def ties(task_vectors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Keep the largest entries of each, elect a sign per entry, average those that agree (arXiv 2306.01708)."""
    if density >= 1:
        stacked = torch.stack([vector.float() for vector in task_vectors])
        mask = merge_utils.calculate_majority_sign_mask(stacked)
        return merge_utils.disjoint_merge(stacked * _shaped(weights, stacked), mask)
    given = [vector.float() for vector in task_vectors]
    return merge_utils.ties(given, torch.tensor(list(weights)), density)


def dare(task_vectors: Sequence[Tensor], weights: Sequence[float], density: float, seed: int, elect: bool) -> Tensor:
    """Drop entries at random and scale up the rest (arXiv 2311.03099), then add, or with ``elect`` as TIES does."""
    if density >= 1:
        return ties(task_vectors, weights, 1.0) if elect else linear(task_vectors, weights)
    given = [vector.float() for vector in task_vectors]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chosen = merge_utils.dare_ties if elect else merge_utils.dare_linear
        return chosen(given, torch.tensor(list(weights)), density)


def seed_of(seed: int, name: str) -> int:
    """A seed for the tensor ``name``, so that it does not matter in which order tensors come."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])


def _shaped(weights: Sequence[float], stacked: Tensor) -> Tensor:
    return torch.tensor(list(weights)).view(-1, *[1] * (stacked.dim() - 1))
