"""Trained modules of ours inside a frozen model of transformers, which keeps its class and the names of its weights.

An insertion is a submodule of the module it changes, and a hook on that module: nothing is replaced, so trl,
transformers and the code here go on finding what they look for. The trainer's checkpoints hold the trained tensors
alone. Left out: what the insertions compute (``virtual_tokens``, ``prefix``, ``bottleneck``, ``llama_adapter``).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.models.tuning.exchange import exchanged

WEIGHTS = "model.safetensors"
"""Where transformers' Trainer looks for a checkpoint's weights on resuming."""


class Insertion(nn.Module):
    """What is put inside a frozen module; without ``enabled`` the module does what it did before."""

    enabled: bool = True


def insertions(model: Any) -> dict[str, Insertion]:
    """Every insertion of ``model`` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Insertion)}


def inserted_weights(model: Any, keep_vars: bool = False) -> dict[str, torch.Tensor]:
    """The insertions' tensors under their names in ``model``, buffers included; ``keep_vars``: not detached."""
    found: dict[str, torch.Tensor] = {}
    for name, module in insertions(model).items():
        found |= {f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=keep_vars).items()}
    return found


def train_insertions_only(model: Any, started: bool = False) -> Any:
    """Freeze all of ``model`` but its insertions and, of a reward model, its score head; give it small checkpoints.

    It gets ``disable_adapter()``, as peft's models have it: a context in which it is the model that came in. Where its
    insertions have been trained already (``started``), that is the model with them as they are now.
    """
    inserted = insertions(model)
    if started:  # a critic is made as a second tree over the policy's tensors; what both train must be two
        for module in [part for one in inserted.values() for part in one.modules()]:
            for name, parameter in list(module._parameters.items()):
                module.register_parameter(name, None if parameter is None else nn.Parameter(parameter.detach().clone()))
    model.initial_insertions = {n: t.clone() for n, t in inserted_weights(model).items()} if started else None
    model.requires_grad_(False)
    for module in inserted.values():
        module.requires_grad_(True)
    if isinstance(getattr(model, "score", None), nn.Module):
        model.score.requires_grad_(True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # With these, a resumed run does not list every frozen tensor as one that the checkpoint lacks.
    model._keys_to_ignore_on_save = sorted(set(model.state_dict()) - trained)
    model.save_pretrained = types.MethodType(_save_trained, model)
    model.disable_adapter = types.MethodType(_without_insertions, model)
    return model


def _save_trained(model: Any, save_directory: Any, **_: Any) -> None:
    """In place of ``save_pretrained``, which the Trainer calls for a checkpoint: the trained tensors and no others."""
    from safetensors.torch import save_file

    trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(trained, folder / WEIGHTS, metadata={"format": "pt"})


@contextlib.contextmanager
def _without_insertions(model: Any) -> Iterator[None]:
    """``model`` as it came in; its insertions come back as they were."""
    if model.initial_insertions is not None:
        with exchanged(inserted_weights(model, keep_vars=True), model.initial_insertions):
            yield
        return
    before = {module: module.enabled for module in insertions(model).values()}
    for module in before:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in before.items():
            module.enabled = enabled


def plain_save(model: Any, out_dir: Path, weights: dict[str, torch.Tensor]) -> None:
    """transformers' own ``save_pretrained`` of ``model`` with these weights, whatever was put in its place."""
    ignored, model._keys_to_ignore_on_save = model._keys_to_ignore_on_save, None
    try:
        type(model).save_pretrained(model, out_dir, state_dict=weights, is_main_process=True)
    finally:
        model._keys_to_ignore_on_save = ignored
