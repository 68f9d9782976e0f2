"""The ``merge`` stage's work: checks, then tensor by tensor into a model of the first checkpoint's kind, and saved."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch

from align.models.merging_methods import methods
from align.models.merging_methods.checks import check_architecture, check_language, check_origin, check_tensors
from align.models.merging_methods.weights import Weights
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact

if TYPE_CHECKING:
    from align.config.stages.merge import MergeConfig

SCORE = frozenset({"score.weight"})
"""A reward model's head, which starts at zero on a base that has none."""


def run(context: StageContext) -> dict[str, Any]:
    """Merge, save ``model/``, and return each checkpoint's distance from the base and how alike their directions are.

    Raises ``UserError`` for checkpoints of different architectures, vocabularies, templates or origins, and for one
    whose adapter is no part of its weights.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from align.models.loading import load_policy, load_reward, load_tokenizer
    from align.models.tuning.apply import save_tuned

    config: MergeConfig = context.config
    field = "rewards" if config.rewards else "policies"
    given: list[Artifact] = context.inputs[field]
    models = [Weights(artifact.model, f"{field} ('{artifact.stage}')") for artifact in given]
    start: Artifact | None = context.inputs["base"]
    base = None if start is None else Weights(start.model, f"base ('{start.stage}')")
    tokenizer = load_tokenizer(given[0].model)
    others = [*zip(models[1:], given[1:], strict=True)] + ([] if base is None or start is None else [(base, start)])
    for weights, artifact in others:
        check_architecture(models[0], weights)
        check_language(tokenizer, load_tokenizer(artifact.model), (models[0].label, weights.label))
        check_tensors(models[0], weights, SCORE if weights is base and config.rewards else frozenset())
    cosines = check_origin(models, base)
    model = (load_reward if config.rewards else load_policy)(given[0].model)
    found = _Distances(len(models))
    slots = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for done, name in enumerate(sorted(models[0].names), start=1):
            tensors = [weights[name].float() for weights in models]
            origin = None if base is None else _origin(base, name, tensors[0])
            merged = merge_tensor(config, name, tensors, origin, context.seed)
            if not bool(torch.isfinite(merged).all()):
                raise RuntimeError(f"{name} is not finite after merging by {config.method}")
            found.add(tensors, origin, merged)
            slots[name].copy_(merged)
            context.progress(done, len(models[0].names), unit="tensors")
    save_tuned(model, tokenizer, context.output / "model")
    return {"models": len(models), "cosine_to_start": cosines, **found.facts()}


def merge_tensor(
    config: MergeConfig, name: str, tensors: list[torch.Tensor], origin: torch.Tensor | None, seed: int
) -> torch.Tensor:
    """One tensor of the result. With a base: base + scale * (merge of the task vectors)."""
    weights = config.coefficients(len(tensors))
    if origin is None:
        if config.method == "slerp":
            return methods.slerp(tensors[0], tensors[1], weights[1])
        return methods.linear(tensors, weights)
    vectors = [tensor - origin for tensor in tensors]
    if config.method == "slerp":
        return origin + config.scale * (methods.slerp(tensors[0], tensors[1], weights[1]) - origin)
    if config.method == "warp":
        merged = methods.warp(vectors)
    elif config.method == "ties":
        merged = methods.ties(vectors, weights, config.density)
    elif config.method in ("dare_linear", "dare_ties"):
        drawn = methods.seed_of(seed, name)
        merged = methods.dare(vectors, weights, config.density, drawn, elect=config.method == "dare_ties")
    else:
        merged = methods.linear(vectors, weights)
    return origin + config.scale * merged


def _origin(base: Weights, name: str, like: torch.Tensor) -> torch.Tensor:
    return base[name].float() if name in base.names else torch.zeros_like(like)


class _Distances:
    """How far models went from the base and in how different directions, summed up tensor by tensor."""

    def __init__(self, count: int) -> None:
        self.products = torch.zeros(count, count, dtype=torch.float64)
        self.base = self.merged = 0.0
        self.known = False

    def add(self, tensors: list[torch.Tensor], origin: torch.Tensor | None, merged: torch.Tensor) -> None:
        """One tensor of each model, the base's and the result's."""
        if origin is None:
            return
        self.known = True
        vectors = torch.stack([(tensor - origin).flatten() for tensor in tensors]).double()
        self.products += vectors @ vectors.T
        self.base += float(origin.double().square().sum())
        self.merged += float((merged - origin).double().square().sum())

    def facts(self) -> dict[str, Any]:
        """``moved``: each model's way from the base as a share of the base's length; ``merged_moved``: the result's.
        ``task_cosines``: of each two task vectors, in the order 1-2, 1-3, 2-3; near 1 says that merging adds little."""
        if not self.known or not self.base:
            return {}
        lengths = self.products.diagonal().sqrt()
        pairs = itertools.combinations(range(len(lengths)), 2)
        return {
            "moved": [float(length) / math.sqrt(self.base) for length in lengths],
            "merged_moved": math.sqrt(self.merged / self.base),
            "task_cosines": [
                float(self.products[a, b] / (lengths[a] * lengths[b])) if lengths[a] * lengths[b] else 0.0
                for a, b in pairs
            ],
        }
