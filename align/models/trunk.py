"""A causal model in its two parts: the trunk that makes hidden states, and the head that makes logits of them."""

from __future__ import annotations

from typing import Any


def trunk_and_head(model: Any) -> tuple[Any, Any]:
    """Trunk and vocabulary head, the latter None where there is none; an adapter around the model is looked through."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(plain, plain.base_model_prefix), plain.get_output_embeddings()


def soft_cap(model: Any) -> float | None:
    """The bound that some models (Gemma 2) put on their logits by a tanh."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return None if cap is None else float(cap)
