"""Check that models can be merged: same architecture, tensors, vocabulary, chat template and origin.

Two models can be averaged only when both were trained from one start. Networks from different random starts differ by a
permutation of their units, and their average is noise (arXiv 1912.05671).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from align.errors import UserError
from align.models.merging_methods.lazy_weights import Weights
from align.models.tokenizer_checks import require_same_vocabulary

INCIDENTAL = frozenset(
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "id2label"),
        *("label2id", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
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
        first_shape, second_shape = first.shape(name), second.shape(name)
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
            matrix, first_matrix = model[name].double(), first[name].double()
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
