"""trl's fused head on a CPU: labeled positions only, and the vocabulary in blocks that stay in cache.

trl 1.16 computes logits in tiles of 4,096 tokens by 32,768 words, with several float32 copies of a tile in its backward
pass: on a CPU up to 4 GiB of memory, and three times the time of ``token_statistics``. Two private names of
``trl.trainer.utils`` are replaced here and nowhere else; ``tests/training/test_fused_head.py`` fails when an upgrade
changes them. Heads with a bias keep trl's own function.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction

from align.models.fast.token_logprobs import LogitTransform, token_statistics
from align.patches.trl import replace_fused_head


def use_blockwise_head() -> None:
    """Make trl's fused head compute labeled positions only, by ``token_statistics`` on a CPU.

    On devices without Triton, trl scores every position, including prompts and padding. With a vocabulary of 49,000
    tokens this is most of a small model's work. trl calls the first replaced function for that choice only.
    """
    replace_fused_head(_BlockwiseHead)


class _BlockwiseHead:
    """Stand-in for trl's autograd function, which is called by its ``apply``."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        *settings: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Return log-probabilities, entropies, ``log_sum_sq_probs``, mean logits and ``is_top1``, (N,) each.

        ``settings`` are the size of a tile, the soft cap, the factor of the logits and the names of the outputs. Those
        that were not asked for are None.
        """
        _, soft_cap, logit_scale, outputs = settings
        is_plain = bias is None and "log_sum_sq_probs" not in outputs
        if hidden.device.type != "cpu" or not is_plain:
            results: tuple[torch.Tensor | None, ...] = ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, temperature, *settings
            )
            return results
        statistics = token_statistics(hidden, weight, targets, temperature, LogitTransform(logit_scale, soft_cap))
        return (
            statistics.logprobs,
            statistics.entropies if "entropy" in outputs else None,
            None,
            statistics.mean_logits if "mean_logits" in outputs else None,
            statistics.is_top1 if "is_top1" in outputs else None,
        )
