"""IA3, and whatever else of peft can be folded into the weights, by its name and its own options."""

from __future__ import annotations

from typing import Any

import torch

from align.config.tuning import IA3_INPUTS, IA3_OUTPUTS, Ia3Tuning, PeftTuning
from align.errors import UserError
from align.models.tuning.folding import folded, tuner_layers
from align.models.tuning.lora import check_names, check_ties

STARTS: dict[str, dict[str, Any]] = {"c3a": {"init_weights": True}, "fourierft": {"init_weights": True}}
"""Options with which a method starts at the model as it came in, where peft's defaults do not."""
OWN_PLACES = ("ln_tuning",)
"""Methods that do not act on linear layers and know their own places."""


def wrap(model: Any, tuning: Ia3Tuning | PeftTuning, seed: int) -> Any:
    """``model`` with the method's parameters, drawn from ``seed``; the caller's randomness is untouched.

    A reward model's score head is trained in full and saved with them. Raises ``UserError`` for options that do not go
    together or do not fit the model, and for a method that cannot be folded.
    """
    from peft import get_peft_config, get_peft_model

    place = "tuning" if isinstance(tuning, Ia3Tuning) else "tuning.options"
    given: dict[str, Any] = {"targets": tuning.targets} if isinstance(tuning, Ia3Tuning) else tuning.options
    for name in ("targets", "target_modules", "modules_to_save"):
        if isinstance(given.get(name), list):
            check_names(model, given[name], f"{place}.{name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made: Any = get_peft_model(model, get_peft_config(_options(model, tuning)))  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
            raise UserError(f"{place}: {tuning.label} does not fit this model: {error}") from None
    check_ties(made)
    layers = tuner_layers(made)
    if not layers:
        raise UserError(f"{place}: {tuning.label} changes no module of this model.")
    first = next(iter(layers.values()))
    try:
        if not any(weight.is_meta for weight in first.parameters()):
            folded(first)
    except ValueError as error:
        raise UserError(f"{place}: {error} Its result would run in no engine; take another method.") from None
    return made


def _options(model: Any, tuning: Ia3Tuning | PeftTuning) -> dict[str, Any]:
    classifier = hasattr(model, "score")
    found: dict[str, Any] = {"task_type": "SEQ_CLS" if classifier else "CAUSAL_LM"}
    if isinstance(tuning, Ia3Tuning):
        names = [name for name, _ in model.named_modules()]
        there = [end for end in (*IA3_OUTPUTS, *IA3_INPUTS) if any(name.endswith(f".{end}") for name in names)]
        inner = [end for end in IA3_INPUTS if end in there] if tuning.feedforward is None else tuning.feedforward
        found |= {"peft_type": "IA3", "target_modules": tuning.targets or there, "feedforward_modules": inner}
        return found | ({"modules_to_save": ["score"]} if classifier else {})
    found |= {"peft_type": tuning.type.upper(), **STARTS.get(tuning.type, {})}
    if tuning.type not in OWN_PLACES:
        found["target_modules"] = "all-linear"
    found |= tuning.options
    if classifier:
        found["modules_to_save"] = sorted({*(found.get("modules_to_save") or ()), "score"})
    return found
