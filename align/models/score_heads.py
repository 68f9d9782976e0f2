"""Give a family of models a class with a score head if transformers has none, such as Granite, LFM2 and Cohere 2.

The class combines transformers' own generic head with the family's base class, as transformers' classes do.
transformers registers no further class for a type of config of its own, so ``align.models.pretrained`` loads it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any


def classifier_class(config: Any) -> Any:
    """Return the class of a causal model's family with a score head; None if there is none.

    Loading, saving and the form of the weights are as in transformers' own sequence classifiers. A model that has no
    attention at all, such as Mamba 2, returns no cache, which the generic head requires.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

    kind = type(config)
    if kind in CLASSIFIERS:
        return CLASSIFIERS[kind]
    if kind not in CAUSAL or not hasattr(config.get_text_config(), "num_attention_heads"):
        return None
    return _combined(CAUSAL[kind], kind)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _combined(causal: Any, kind: Any) -> Any:
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification

    # The family's base class is the first one below the causal class, and initializes the weights of all its models.
    family = next(base for base in causal.__mro__[1:] if issubclass(base, PreTrainedModel))
    name = causal.__name__.replace("ForCausalLM", "ForSequenceClassification")
    # With a module outside of transformers, loading would not compute buffers that are not stored (Falcon-H1's scales).
    fields = {"base_model_prefix": causal.base_model_prefix, "config_class": kind, "__module__": causal.__module__}
    return type(name, (GenericForSequenceClassification, family), fields)
