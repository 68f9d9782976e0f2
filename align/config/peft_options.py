"""Methods of the installed peft and the options of their config classes, checked. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.config.class_options import Option, refuse_unknown_option
from align.config.field_dumps import PEFT, field_dump
from align.config.validation import hint_nearest

METHODS = {
    "lora": "method: lora",
    "ia3": "method: ia3",
    "prefix_tuning": "method: prefix",
    "prompt_tuning": "method: prompt",
    "p_tuning": "method: p_tuning",
    "adaption_prompt": "method: adapters, kind: llama_adapter",
}
"""Methods that have a separate ``method``, with its YAML."""

REFUSED = {
    "adalora": "its ranks are redistributed at every step, by calls that trainers here do not make",
    "beft": "it trains biases, which most models here do not have",
    "cartridge": "it is a key-value cache, not a change of weights",
    "cpt": "it needs its own way to build batches",
    "lily": "it cannot be merged into the weights, so no engine could run what was trained",
    "mixed": "it is a container of adapters, not a method",
    "multitask_prompt_tuning": "it needs a task's number with every row",
    "poly": "it needs a task's number with every row",
    "shadow": "it cannot be merged into the weights, so no engine could run what was trained",
    "trainable_tokens": "it trains rows of the embedding alone; `method: lora` has `save_modules: [embed_tokens]`",
    "xlora": "it mixes adapters that were trained before",
}
"""Methods that cannot be used, with the reason."""

SET_HERE = {
    "peft_type": "it follows from 'type'",
    "task_type": "the stage decides",
    "inference_mode": "it is trained",
    "base_model_name_or_path": "the stage loads the model",
    "revision": "the stage loads the model",
    "auto_mapping": "the stage loads the model",
    "peft_version": "peft writes it",
    "runtime_config": "the stage loads the model",
}
"""Fields of every config class that no user sets, with the reason."""


def peft_types() -> list[str]:
    """Return every method of the installed peft that ``type`` may name; raise ``ValueError`` if its import fails."""
    dump = field_dump(PEFT)
    if dump.errors:
        raise ValueError(f"the methods of peft cannot be read: {next(iter(dump.errors.values()))}")
    return list(dump.classes)


def check_type(name: str) -> None:
    """Raise ``ValueError`` for a method that peft does not have or that cannot be used."""
    if name in METHODS:
        raise ValueError(f"'{name}' is set with `{METHODS[name]}`.")
    if name in REFUSED:
        raise ValueError(f"'{name}' cannot be used: {REFUSED[name]}.")
    types = peft_types()
    if name not in types:
        hint = hint_nearest(name, [*types, *METHODS])
        raise ValueError(f"the installed peft has no method '{name}', only {', '.join(types)}.{hint}")


def check_options(kind: str, mapping: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for the first option that peft's config class of ``kind`` does not have or accept."""
    options = peft_options(kind)
    for name, value in mapping.items():
        refuse_unknown_option(name, options, f"peft's {kind}")
        if name in SET_HERE:
            raise ValueError(f"'{name}' is not set here: {SET_HERE[name]}.")
        if name == "bias" and value != "none":
            raise ValueError("'bias' trains the model's own biases, which then cannot be switched off for a reference.")
        options[name].check(value)


def peft_options(kind: str) -> dict[str, Option]:
    """Return every field of peft's config class for ``kind`` by name, base classes included."""
    return field_dump(PEFT).options(kind)
