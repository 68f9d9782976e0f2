"""Merge several checkpoints of one base model: the maths, lazy reading of their weights, and checks.

A *task vector* is a model's tensor minus the base's (arXiv 2212.04089). TIES and DARE are peft's own functions; linear
averages, SLERP and WARP are here. Excluded: merges that need data or gradients (Fisher, RegMean).

Two models can be averaged only when both were trained from one start. Networks from different random starts differ by a
permutation of their units, and their average is noise (arXiv 1912.05671).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import merge_utils
from safetensors import safe_open

from align.errors import UserError
from align.models.checkpoints.files import weight_files
from align.models.checkpoints.folder_checks import require_same_vocabulary
from align.models.tuning.stored import FOLDER, is_stored, stored_tuning

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
    start = a.float()
    end = b.float()
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
        # With density 1 no value is trimmed, so only the sign election and the disjoint merge remain.
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
    """Return a seed for the tensor ``name``, so results do not depend on the order of tensors."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])


def _shaped(weights: Sequence[float], stacked: Tensor) -> Tensor:
    return torch.tensor(list(weights)).view(-1, *[1] * (stacked.dim() - 1))


HEAD = "lm_head.weight"


class Weights:
    """Tensors of a model folder by name, read on access."""

    def __init__(self, folder: Path, label: str) -> None:
        """Open a folder, called ``label`` in messages. Raises ``UserError`` if an adapter is stored in it."""
        self.folder = folder
        self.label = label
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / FOLDER).is_dir():
            raise UserError(
                f"{label} carries an adapter that is no part of its weights ({self._method()}), so its weights are "
                "those of its base. Merge checkpoints of methods that fold into the weights (docs/methods.md)."
            )
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)
        self.tied = bool(self.config.get("tie_word_embeddings", False)) and "score.weight" not in self._files
        # A tied head may be written next to the embeddings or omitted; it is one tensor either way.
        self.names = {name for name in self._files if not (self.tied and name == HEAD)}

    def _method(self) -> str:
        if is_stored(self.folder):
            return stored_tuning(self.folder).label
        return "prefix, sequential adapters or LLaMA-Adapter"

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its values."""
        with safe_open(self._files[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())


INCIDENTAL = frozenset(
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "id2label"),
        *("label2id", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
        *("output_router_logits", "router_aux_loss_coef"),
        *("problem_type", "return_dict", "output_attentions", "output_hidden_states", "_attn_implementation"),
    }
)
"""Fields of a config that do not change the computation; heads and tokens are compared as tensors and vocabularies."""

LEAST_COSINE = 0.5
"""Least cosine of two models' matrices as one vector; fine-tunes of one base are above 0.9, unrelated ones at 0."""


def check_architecture(first: Weights, second: Weights) -> None:
    """Raise ``UserError`` with the first setting in which two configs differ."""
    for name in sorted({*first.config, *second.config} - INCIDENTAL):
        first_value = first.config.get(name)
        second_value = second.config.get(name)
        if first_value != second_value:
            raise UserError(
                f"{first.label} and {second.label} are not of one architecture: {name} is {first_value!r} and "
                f"{second_value!r}. Merge checkpoints of one base model."
            )


def check_tensors(first: Weights, second: Weights, optional: frozenset[str] = frozenset()) -> None:
    """Raise ``UserError`` unless both have the same tensors; either may lack ``optional`` ones."""
    unshared = sorted((first.names ^ second.names) - optional)
    if unshared:
        name = unshared[0]
        complete, incomplete = (first, second) if name in first.names else (second, first)
        raise UserError(
            f"{incomplete.label} has no {name}, which {complete.label} has; they are not of one architecture."
        )
    for name in sorted(first.names & second.names):
        first_shape = first.shape(name)
        second_shape = second.shape(name)
        if first_shape != second_shape:
            hint = " Their vocabularies differ." if first_shape[1:] == second_shape[1:] else ""
            raise UserError(
                f"{name} is {list(first_shape)} in {first.label} and {list(second_shape)} in {second.label}.{hint}"
            )


def check_language(first: Any, second: Any, labels: tuple[str, str]) -> None:
    """Raise ``UserError`` unless two tokenizers have the same token ids and chat template."""
    require_same_vocabulary(first, second, labels, "merge checkpoints of one base model.")
    if first.chat_template != second.chat_template:
        raise UserError(
            f"{labels[0]} and {labels[1]} have different chat templates: each was trained on another form of "
            "conversation. Merge checkpoints that were trained with one template."
        )


def check_origin(models: Sequence[Weights], base: Weights | None) -> list[float]:
    """Return the cosine between each model's matrices, as one vector, and the base's (without one: the first model's).

    Raises ``UserError`` for a model that does not share its start.
    """
    first = base or models[0]
    cosines = []
    for model in models if base is not None else models[1:]:
        product = norm = first_norm = 0.0
        for name in sorted(model.names & first.names):
            matrix = model[name].double()
            first_matrix = first[name].double()
            if matrix.dim() > 1:
                # Accumulate the inner product and both norms over all matrices, one tensor at a time.
                product += float((matrix * first_matrix).sum())
                norm += float(matrix.square().sum())
                first_norm += float(first_matrix.square().sum())
        cosine = product / math.sqrt(norm * first_norm) if norm and first_norm else 0.0
        if cosine < LEAST_COSINE:
            raise UserError(
                f"{model.label} and {first.label} were not trained from one start: the cosine of their weights is "
                f"{cosine:.2f}, where fine-tuned models of one base are above 0.9. Merged, they would be noise."
            )
        cosines.append(cosine)
    return cosines
