"""IA3, and every other peft method that can be merged into the weights, by its name and its own options."""

from __future__ import annotations

from typing import Any

import torch

from align.config.tuning import IA3_INPUTS, IA3_OUTPUTS, Ia3Tuning, PeftTuning
from align.errors import UserError
from align.models.tuning.layers import tuner_layers
from align.models.tuning.lora import check_names, check_ties
from align.models.tuning.merged_weights import merge_layer

STARTS: dict[str, dict[str, Any]] = {"c3a": {"init_weights": True}, "fourierft": {"init_weights": True}}
"""Options with which a method starts as the initial model, where peft's defaults do not."""
WITHOUT_TARGETS = ("ln_tuning",)
"""Methods that do not act on linear layers and choose their modules themselves."""


def wrap(model: Any, tuning: Ia3Tuning | PeftTuning, seed: int) -> Any:
    """Return ``model`` with the method's parameters, drawn from ``seed``; the caller's random state is unchanged.

    A reward model's score head is trained in full and saved with them. Raises ``UserError`` for options that conflict
    or do not fit the model, and for a method that cannot be merged.
    """
    from peft import get_peft_config, get_peft_model

    place = "tuning" if isinstance(tuning, Ia3Tuning) else "tuning.options"
    options: dict[str, Any] = {"targets": tuning.targets} if isinstance(tuning, Ia3Tuning) else tuning.options
    for name in ("targets", "target_modules", "modules_to_save"):
        if isinstance(options.get(name), list):
            check_names(model, options[name], f"{place}.{name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft_model: Any = get_peft_model(model, get_peft_config(_options(model, tuning)))  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
            raise UserError(f"{place}: {tuning.label} does not fit this model: {error}") from None
    check_ties(peft_model)
    layers = tuner_layers(peft_model)
    if not layers:
        raise UserError(f"{place}: {tuning.label} changes no module of this model.")
    # Merge one layer as a test, unless the model has no weights yet (meta device).
    first = next(iter(layers.values()))
    try:
        if not any(weight.is_meta for weight in first.parameters()):
            merge_layer(first)
    except ValueError as error:
        raise UserError(f"{place}: {error} Its result would run in no engine; take another method.") from None
    return peft_model


def _options(model: Any, tuning: Ia3Tuning | PeftTuning) -> dict[str, Any]:
    classifier = hasattr(model, "score")
    options: dict[str, Any] = {"task_type": "SEQ_CLS" if classifier else "CAUSAL_LM"}
    if isinstance(tuning, Ia3Tuning):
        names = [name for name, _ in model.named_modules()]
        # IA3 scales outputs of keys and values and inputs of the MLP's last matrix, by the names that this model has.
        present = [end for end in (*IA3_OUTPUTS, *IA3_INPUTS) if any(name.endswith(f".{end}") for name in names)]
        inner = [end for end in IA3_INPUTS if end in present] if tuning.feedforward is None else tuning.feedforward
        options |= {"peft_type": "IA3", "target_modules": tuning.targets or present, "feedforward_modules": inner}
        return options | ({"modules_to_save": ["score"]} if classifier else {})
    options |= {"peft_type": tuning.type.upper(), **STARTS.get(tuning.type, {})}
    if tuning.type not in WITHOUT_TARGETS:
        options["target_modules"] = "all-linear"
    options |= tuning.options
    if classifier:
        options["modules_to_save"] = sorted({*(options.get("modules_to_save") or ()), "score"})
    return options
