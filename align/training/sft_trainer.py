"""What SFT adds around trl's trainer: a look at rows before they are packed, noise, and whether kernels are there."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from align.config.runtime import Runtime
from align.errors import UserError
from align.models.threads import device_of
from align.training.neftune import NoisyEmbeddings
from align.training.rows import Encoded


@dataclass(frozen=True)
class LintedRows:
    """A trainer as ``align.lint.trainer`` reads one, with its rows one by one."""

    train_dataset: Any
    data_collator: Any
    processing_class: Any
    model: Any


def lint_rows(trainer: Any, train: Encoded) -> LintedRows:
    """``trainer`` with the rows that its packs were made of."""
    rows = Dataset.from_list(train.rows)
    return LintedRows(rows, trainer.data_collator, trainer.processing_class, trainer.model)


@contextmanager
def noisy(model: Any, alpha: float | None) -> Iterator[None]:
    """Within it, ``model`` has noise on its embeddings while training; none for ``alpha`` None."""
    noise = NoisyEmbeddings(model, alpha) if alpha is not None else None
    try:
        yield
    finally:
        if noise is not None:
            noise.remove()


def check_kernels(stage: str, options: Mapping[str, Any], runtime: Runtime) -> None:
    """``UserError`` where ``trainer: {use_liger_kernel: true}`` asks for what is not there.

    Liger's Triton kernels for norms, rotations and gated layers run on GPUs. Its fused cross-entropy stays off in trl
    1.16, whose own fused head does that work.
    """
    if not options.get("use_liger_kernel"):
        return
    if device_of(runtime).type != "cuda":
        raise UserError(
            f"{stage}: trainer.use_liger_kernel needs a GPU, and this stage runs on the CPU; leave it out. The chunked "
            "cross-entropy is there without it."
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            f"{stage}: trainer.use_liger_kernel needs the package liger-kernel; install it or leave it out."
        )
