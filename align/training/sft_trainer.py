"""Additions of SFT to trl's trainer: rows for the linter, NEFTune's noise, and a check for Liger's kernels.

NEFTune (arXiv 2310.05914) adds noise to the embeddings in training to reduce memorization of the wording. The noise is
uniform in ±alpha / sqrt(L d), with L the tokens of the row and d the size of the embeddings. L is each row's own
length. transformers' hook (``trainer: {neftune_noise_alpha: ...}``) would use the padded or packed length, which gives
packed rows a fraction of the noise. The noise comes from torch's global generator, whose state checkpoints store.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from align.config.runtime import Runtime
from align.errors import UserError
from align.models.checkpoints.conversion import plain_of
from align.models.compute.processes import device_of
from align.models.fast.real_tokens import compute_real_tokens, computes_real_tokens
from align.training.rows import Encoded, collate_numbers
from align.training.trainers import row_lengths


@dataclass
class AnswerCollator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """Collates padded rows, and the numbers of the rows if an own loss needs them."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return trl's batch with the rows' numbers."""
        batch: dict[str, Any] = super().torch_call(examples)
        return batch | collate_numbers(examples)


@dataclass(frozen=True)
class LintedRows:
    """The parts of a trainer that ``align.lint.trainer`` reads, with unpacked rows."""

    train_dataset: Any
    data_collator: Any
    processing_class: Any
    model: Any


def lint_rows(trainer: Any, train: Encoded) -> LintedRows:
    """Return the view of ``trainer`` with the rows before packing."""
    rows = Dataset.from_list(train.rows)
    return LintedRows(rows, trainer.data_collator, trainer.processing_class, trainer.model)


@contextmanager
def noisy(model: Any, alpha: float | None) -> Iterator[None]:
    """Inside, ``model`` has noise on its embeddings in training mode; none for ``alpha`` None."""
    if alpha is not None and computes_real_tokens(model):
        # Every row has its own noise, at the scale of its length, so no prefix is shared.
        compute_real_tokens(model, share=False)
    noise = NoisyEmbeddings(model, alpha) if alpha is not None else None
    try:
        yield
    finally:
        if noise is not None:
            noise.remove()


def check_kernels(stage: str, options: Mapping[str, Any], runtime: Runtime) -> None:
    """Raise ``UserError`` if ``trainer: {use_liger_kernel: true}`` cannot work.

    Liger's Triton kernels for norms, rotations and gated layers run on GPUs. Its fused cross-entropy stays off in trl
    1.16, which has its own fused head.
    """
    if not options.get("use_liger_kernel"):
        return
    if device_of(runtime).type != "cuda":
        raise UserError(
            f"{stage}: trainer.use_liger_kernel needs a GPU, and this stage runs on the CPU; remove it. The chunked "
            "cross-entropy works without it."
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            f"{stage}: trainer.use_liger_kernel needs the package liger-kernel; install it or remove the option."
        )


class NoisyEmbeddings:
    """Adds the noise in training mode until ``remove`` is called."""

    def __init__(self, model: Any, alpha: float) -> None:
        causal_model = plain_of(model)
        self.alpha = alpha
        self.lengths = torch.ones(1, 1)
        self.hooks = [
            causal_model.base_model.register_forward_pre_hook(self._measure, with_kwargs=True),
            causal_model.get_input_embeddings().register_forward_hook(self._add),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def _measure(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        # Packed rows: positions restart at each row. Padded rows: the mask counts their tokens.
        if kwargs.get("position_ids") is not None and ids is not None and ids.shape[0] == 1:
            lengths = torch.tensor(row_lengths(kwargs["position_ids"]), dtype=torch.long)
            self.lengths = torch.repeat_interleave(lengths, lengths)[None]
        elif mask is not None and mask.dim() == 2:
            self.lengths = mask.sum(dim=1, keepdim=True)
        elif ids is not None:
            self.lengths = torch.full((len(ids), 1), ids.shape[1], device=ids.device)

    def _add(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        bound = self.alpha / (self.lengths.to(output.device) * output.shape[-1]).float().sqrt()  # (B, 1) or (1, N)
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1) * bound[..., None]
        return output + noise.to(output.dtype)
