"""Stage ``merge``: check the checkpoints, merge them tensor by tensor into the first's architecture, and save."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch

from align.models.merging import (
    HEAD,
    Weights,
    check_architecture,
    check_language,
    check_origin,
    check_tensors,
    dare,
    linear,
    seed_of,
    slerp,
    ties,
    warp,
)
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact

if TYPE_CHECKING:
    from align.config.stages.merge import MergeConfig

HEADS = frozenset({"score.weight", HEAD})
"""Heads of a reward model and of a policy as its base: the missing score head counts as zero, the output head is left
out."""


def run(context: StageContext) -> dict[str, Any]:
    """Merge, save ``model/``, and return each checkpoint's distance from the base and the cosines of their directions.

    Raises ``UserError`` for checkpoints of different architectures, vocabularies, templates or origins, and for one
    whose adapter is not merged into its weights.
    """
    from align.models.compute.processes import use_threads

    use_threads(context.runtime)
    from align.models.loading import load_policy, load_reward, load_tokenizer
    from align.models.pretrained import with_tensors
    from align.models.tuning.apply import save_tuned

    config: MergeConfig = context.config
    field = "rewards" if config.rewards else "policies"
    artifacts: list[Artifact] = context.inputs[field]
    models = [Weights(artifact.model, f"{field} ('{artifact.stage}')") for artifact in artifacts]
    start: Artifact | None = context.inputs["base"]
    base = None if start is None else Weights(start.model, f"base ('{start.stage}')")
    tokenizer = load_tokenizer(artifacts[0].model)
    compared = list(zip(models[1:], artifacts[1:], strict=True))
    if base is not None and start is not None:
        compared.append((base, start))
    for weights, artifact in compared:
        check_architecture(models[0], weights)
        check_language(tokenizer, load_tokenizer(artifact.model), (models[0].label, weights.label))
        check_tensors(models[0], weights, HEADS if weights is base and config.rewards else frozenset())
    # Checkpoints of another origin average to noise, which no later check would notice.
    cosines = check_origin(models, base)
    model = (load_reward if config.rewards else load_policy)(artifacts[0].model)
    distances = _Distances(len(models))
    # Merged tensors are written into the first model, one by one: memory for a single tensor of each is enough.
    slots = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # A mixture's files name each expert, and its model has one tensor for all: transformers combines them at the end.
    by_file_name: dict[str, torch.Tensor] = {}
    has_other_names = not models[0].names <= slots.keys()
    with torch.no_grad():
        for count, name in enumerate(sorted(models[0].names), start=1):
            tensors = [weights[name].float() for weights in models]
            origin = None if base is None else _origin(base, name, tensors[0])
            merged = merge_tensor(config, name, tensors, origin, context.seed)
            if not bool(torch.isfinite(merged).all()):
                raise RuntimeError(f"{name} is not finite after merging by {config.method}")
            distances.add(tensors, origin, merged)
            if has_other_names:
                by_file_name[name] = merged
            else:
                slots[name].copy_(merged)
            context.progress(count, len(models[0].names), unit="tensors")
    if has_other_names:
        model = with_tensors(model, by_file_name)
    save_tuned(model, tokenizer, context.output / "model")
    return {"models": len(models), "cosine_to_start": cosines, **distances.facts()}


def merge_tensor(
    config: MergeConfig, name: str, tensors: list[torch.Tensor], origin: torch.Tensor | None, seed: int
) -> torch.Tensor:
    """Return one tensor of the result; with a base it is base + scale * merge(task vectors).

    ``tensors`` and ``origin`` have the same shape; ``origin`` is the base's tensor.
    """
    weights = config.coefficients(len(tensors))
    if origin is None:
        if config.method == "slerp":
            return slerp(tensors[0], tensors[1], weights[1])
        return linear(tensors, weights)
    # Task vectors: each checkpoint's change from the base.
    vectors = [tensor - origin for tensor in tensors]
    if config.method == "slerp":
        return origin + config.scale * (slerp(tensors[0], tensors[1], weights[1]) - origin)
    if config.method == "warp":
        merged = warp(vectors)
    elif config.method == "ties":
        merged = ties(vectors, weights, config.density)
    elif config.method in ("dare_linear", "dare_ties"):
        tensor_seed = seed_of(seed, name)
        merged = dare(vectors, weights, config.density, tensor_seed, elect=config.method == "dare_ties")
    else:
        merged = linear(vectors, weights)
    return origin + config.scale * merged


def _origin(base: Weights, name: str, like: torch.Tensor) -> torch.Tensor:
    """Return the base's tensor, or zeros of the same shape if it has none."""
    return base[name].float() if name in base.names else torch.zeros_like(like)


class _Distances:
    """Distances of the models from the base and cosines of their directions, accumulated tensor by tensor."""

    def __init__(self, count: int) -> None:
        self.products = torch.zeros(count, count, dtype=torch.float64)
        self.base = self.merged = 0.0
        self.has_base = False

    def add(self, tensors: list[torch.Tensor], origin: torch.Tensor | None, merged: torch.Tensor) -> None:
        """Add one tensor of each model, of the base and of the result; all have the same shape."""
        if origin is None:
            return
        self.has_base = True
        # In float64, since millions of small products are added up.
        vectors = torch.stack([(tensor - origin).flatten() for tensor in tensors]).double()
        # Inner products add up over tensors; lengths and cosines follow from them at the end.
        self.products += vectors @ vectors.T
        self.base += float(origin.double().square().sum())
        self.merged += float((merged - origin).double().square().sum())

    def facts(self) -> dict[str, Any]:
        """Return metrics.

        ``moved`` are the norms of the task vectors as shares of the base's norm, ``merged_moved`` the result's.
        ``task_cosines`` are the cosines of every two task vectors (1-2, 1-3, 2-3, …); near 1, merging adds little.
        """
        if not self.has_base or not self.base:
            return {}
        lengths = self.products.diagonal().sqrt()  # norms of the task vectors, shape (models,)
        cosines = []
        for first, second in itertools.combinations(range(len(lengths)), 2):
            product = lengths[first] * lengths[second]
            cosines.append(float(self.products[first, second] / product) if product else 0.0)
        return {
            "moved": [float(length) / math.sqrt(self.base) for length in lengths],
            "merged_moved": math.sqrt(self.merged / self.base),
            "task_cosines": cosines,
        }
