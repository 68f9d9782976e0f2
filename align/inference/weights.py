"""Weights of a saved checkpoint, one tensor at a time, for switching an engine from one policy to another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from align.models import files

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_tied_head(weights: Iterable[tuple[str, torch.Tensor]], tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, and after them the output head of a model with ``tied`` embeddings if it is not among them.

    The head has the embeddings' shape (V, H). vLLM's CPU backend keeps a packed copy of the head: without the head
    under its own name the sampler goes on with the old one, silently.
    """
    embedding, has_head = None, False
    for name, tensor in weights:
        has_head = has_head or name == HEAD
        if name == EMBEDDING:
            embedding = tensor
        yield name, tensor
    # Some checkpoints store a tied head, some do not.
    if tied and not has_head and embedding is not None:
        yield HEAD, embedding


def weight_files(model_dir: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint. Raises ``UserError`` when there are none."""
    return files.weight_files(model_dir)


def adapter_weights(model_dir: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint's stored adapter (``align.models.tuning.stored``) by name, if it has one.

    They have the shapes in which the adapter stored them.
    """
    from safetensors.torch import load_file

    file = model_dir / "adapter" / "adapter.safetensors"
    return load_file(file) if file.is_file() else {}


def weight_names(model_dir: Path) -> set[str]:
    """Return the names of a checkpoint's tensors, those of its stored adapter included."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names | set(adapter_weights(model_dir))


def refuse_missing(names: set[str], loaded: set[str]) -> None:
    """Raise ``ValueError`` unless every name was loaded: an engine keeps the old tensor where no new one comes."""
    missing = sorted(names - loaded)
    if missing:
        raise ValueError(f"the new weights lack {', '.join(missing[:3])}: a full set is needed")


def checkpoint_weights(model_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` of a checkpoint, on the CPU, for ``RolloutEngine.load_weights``."""
    from safetensors import safe_open

    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict: it cannot be iterated
                yield name, opened.get_tensor(name)
    yield from adapter_weights(model_dir).items()
