"""NEFTune (arXiv 2310.05914): noise on the embeddings while training, so that a model holds less to the words it saw.

Uniform in ±alpha / sqrt(L d), L the tokens of the row and d the embeddings' size. L is each row's own length, whatever
stands beside it: transformers' hook, which ``trainer: {neftune_noise_alpha: ...}`` would start, takes the padded or
packed length, and so gives packed rows a fraction of the noise. Drawn from torch's global generator, which checkpoints
hold.
"""

from __future__ import annotations

from typing import Any

import torch

from align.training.packing import plain_of


class NoisyEmbeddings:
    """Adds the noise in training mode, until ``remove``."""

    def __init__(self, model: Any, alpha: float) -> None:
        plain = plain_of(model)
        self.alpha, self.lengths = alpha, torch.ones(1, 1)
        self.hooks = [
            plain.base_model.register_forward_pre_hook(self._measure, with_kwargs=True),
            plain.get_input_embeddings().register_forward_hook(self._add),
        ]

    def remove(self) -> None:
        """Take the noise off."""
        for hook in self.hooks:
            hook.remove()

    def _measure(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        if kwargs.get("position_ids") is not None and ids is not None and ids.shape[0] == 1:
            self.lengths = row_lengths(kwargs["position_ids"])
        elif mask is not None and mask.dim() == 2:
            self.lengths = mask.sum(dim=1, keepdim=True)
        elif ids is not None:
            self.lengths = torch.full((len(ids), 1), ids.shape[1], device=ids.device)

    def _add(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        most = self.alpha / (self.lengths.to(output.device) * output.shape[-1]).float().sqrt()  # (B, 1) or (1, N)
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1) * most[..., None]
        return output + noise.to(output.dtype)


def row_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """(1, N): of each token the length of its row, for positions (1, N) that begin anew with every row."""
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([position_ids.shape[1]])])
    return torch.repeat_interleave(ends - starts, ends - starts)[None]
