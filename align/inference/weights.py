"""The weights of a saved checkpoint, one tensor at a time: to switch an engine from one policy to another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from align.models import files

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_tied_head(weights: Iterable[tuple[str, torch.Tensor]], tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, and behind them the output head of a model with ``tied`` embeddings, if it is not among them.

    vLLM's CPU backend keeps a packed copy of the head: without the head under its own name the sampler goes on with
    the old one, silently.
    """
    embedding, seen = None, False
    for name, tensor in weights:
        seen = seen or name == HEAD
        if name == EMBEDDING:
            embedding = tensor
        yield name, tensor
    if tied and not seen and embedding is not None:
        yield HEAD, embedding


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors of a checkpoint, as every loader reads them. Raises ``UserError`` when there are none."""
    return files.weight_files(model_dir)


def adapter_weights(model_dir: Path) -> dict[str, torch.Tensor]:
    """Tensors of the adapter that a checkpoint keeps beside its weights (``align.models.tuning.stored``), if any."""
    from safetensors.torch import load_file

    file = model_dir / "adapter" / "adapter.safetensors"
    return load_file(file) if file.is_file() else {}


def weight_names(model_dir: Path) -> set[str]:
    """Names of a checkpoint's tensors, its stored adapter's among them."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names | set(adapter_weights(model_dir))


def refuse_missing(names: set[str], seen: set[str]) -> None:
    """Raise ``ValueError`` unless every name was seen: where no new weight comes, an engine keeps the old one."""
    missing = sorted(names - seen)
    if missing:
        raise ValueError(f"the new weights lack {', '.join(missing[:3])}: a full set is needed")


def checkpoint_weights(model_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """``(name, tensor)`` of a checkpoint, on the CPU, for ``RolloutEngine.load_weights``."""
    from safetensors import safe_open

    for file in weight_files(model_dir):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict: it cannot be iterated
                yield name, opened.get_tensor(name)
    yield from adapter_weights(model_dir).items()
