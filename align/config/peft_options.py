"""Methods of the installed peft and the options of their config classes, read from its source. Torch-free."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from align.config.class_options import Option, class_options, find_option, package_folder
from align.config.validation import hint_nearest

METHODS = {
    "lora": "method: lora",
    "ia3": "method: ia3",
    "prefix_tuning": "method: prefix",
    "prompt_tuning": "method: prompt",
    "p_tuning": "method: p_tuning",
    "adaption_prompt": "method: adapters, kind: llama_adapter",
}
"""Methods that have a ``method`` of their own, with its YAML."""

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
    """Return every method of the installed peft that ``type`` may name."""
    folders = (package_folder("peft") / "tuners").iterdir()
    installed = {folder.name for folder in folders if (folder / "config.py").is_file()}
    return sorted(installed - set(REFUSED) - set(METHODS))


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
        option = find_option(options, name, f"peft's {kind}")
        if name in SET_HERE:
            raise ValueError(f"'{name}' is not set here: {SET_HERE[name]}.")
        if name == "bias" and value != "none":
            raise ValueError("'bias' trains the model's own biases, which then cannot be switched off for a reference.")
        option.check(value)


@functools.cache
def peft_options(kind: str) -> dict[str, Option]:
    """Return every field of peft's config class for ``kind`` by name, base classes included."""
    # Read as source: importing peft would import torch, which takes seconds.
    file = f"tuners/{kind}/config.py"
    tree = ast.parse((package_folder("peft") / file).read_text(encoding="utf-8"))
    class_name = kind.replace("_", "") + "config"
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.lower() == class_name]
    if not names:
        raise LookupError(f"peft/{file} has no class {class_name}; this version of peft is not one align knows.")
    return {name: _plain(option) for name, option in class_options("peft", file, names[0]).items()}


def _plain(option: Option) -> Option:
    """Rewrite ``Optional[Union[str, Literal["a"]]]`` as ``str | ...``.

    Literals become choices if the annotation allows nothing else but None.
    """
    # The annotation is source text, since peft is not imported; only its literals and type names matter.
    members = _members(ast.parse(option.annotation, mode="eval").body)
    literals = [member for member in members if isinstance(member, tuple)]
    plain = [member for member in members if isinstance(member, str)]
    if literals and set(plain) <= {"None"}:
        choices = tuple(value for literal in literals for value in literal)
        return replace(option, choices=(*choices, *([None] if plain else [])))
    if literals:  # literals are texts
        plain += ["str"]
    return replace(option, annotation=" | ".join(dict.fromkeys(plain)))


def _members(node: ast.expr) -> list[str | tuple[Any, ...]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_members(node.left), *_members(node.right)]
    if isinstance(node, ast.Subscript):
        inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        match ast.unparse(node.value).rpartition(".")[2]:
            case "Union":
                return [member for part in inner for member in _members(part)]
            case "Optional":
                return [*_members(inner[0]), "None"]
            case "Literal":
                return [tuple(ast.literal_eval(part) for part in inner)]
    return [ast.unparse(node)]
