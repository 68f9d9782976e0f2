"""What must be the same in models before they are merged: architecture, tensors, vocabulary, template, and the origin.

Weights mean the same in two models only where training has not taken them far from a common start: two networks from
different random starts have a permutation of units between them, and their average is noise (arXiv 1912.05671).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from align.errors import UserError
from align.models.merging_methods.weights import Weights

INCIDENTAL = frozenset(
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "id2label"),
        *("label2id", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
        *("problem_type", "return_dict", "output_attentions", "output_hidden_states", "_attn_implementation"),
    }
)
"""Fields of a config that say nothing of the computation; heads and tokens are compared as tensors and vocabularies."""

LEAST_COSINE = 0.5
"""Of all matrices of two models as one vector. Fine-tuned models of one base are above 0.9, unrelated ones at 0."""


def check_architecture(one: Weights, other: Weights) -> None:
    """``UserError`` that names the first setting in which two configs differ."""
    for name in sorted({*one.config, *other.config} - INCIDENTAL):
        mine, theirs = one.config.get(name), other.config.get(name)
        if mine != theirs:
            raise UserError(
                f"{one.label} and {other.label} are not of one architecture: {name} is {mine!r} and {theirs!r}. Merge "
                "checkpoints of one base model."
            )


def check_tensors(one: Weights, other: Weights, optional: frozenset[str] = frozenset()) -> None:
    """``UserError`` unless ``other`` has the tensors of ``one`` in their shapes; ``optional`` ones may be missing."""
    for name in sorted(one.names):
        if name not in other.names:
            if name in optional:
                continue
            raise UserError(f"{other.label} has no {name}, which {one.label} has; they are not of one architecture.")
        mine, theirs = one.shape(name), other.shape(name)
        if mine != theirs:
            hint = " Their vocabularies differ." if mine[1:] == theirs[1:] else ""
            raise UserError(f"{name} is {list(mine)} in {one.label} and {list(theirs)} in {other.label}.{hint}")


def check_language(one: Any, other: Any, labels: tuple[str, str]) -> None:
    """``UserError`` unless two tokenizers give every token the same id and have one chat template."""
    if one.get_vocab() != other.get_vocab():
        raise UserError(
            f"{labels[0]} and {labels[1]} have different vocabularies ({len(one)} and {len(other)} tokens); merge "
            "checkpoints of one base model."
        )
    if one.chat_template != other.chat_template:
        raise UserError(
            f"{labels[0]} and {labels[1]} have different chat templates: each was trained on another form of "
            "conversation. Merge checkpoints that were trained with one template."
        )


def check_origin(models: Sequence[Weights], base: Weights | None) -> list[float]:
    """Cosine of each model's matrices, as one vector, with the base's (without one: the first model's).

    Raises ``UserError`` for a model that has no start in common with it.
    """
    first = base or models[0]
    found = []
    for model in models if base is not None else models[1:]:
        product = mine = theirs = 0.0
        for name in sorted(model.names & first.names):
            one, other = model[name].double(), first[name].double()
            if one.dim() > 1:
                product += float((one * other).sum())
                mine += float(one.square().sum())
                theirs += float(other.square().sum())
        cosine = product / math.sqrt(mine * theirs) if mine and theirs else 0.0
        if cosine < LEAST_COSINE:
            raise UserError(
                f"{model.label} and {first.label} were not trained from one start: the cosine of their weights is "
                f"{cosine:.2f}, where fine-tuned models of one base are above 0.9. Merged, they would be noise."
            )
        found.append(cosine)
    return found
