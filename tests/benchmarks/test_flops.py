"""Floating-point operations by hand."""

from __future__ import annotations

from align.config.tuning import FullTuning, LoraTuning
from benchmarks.flops import forward_flops, learning_flops
from tests.support.capacity.models import TOY


def test_operations_by_hand() -> None:
    # 3 tokens: 2 x 50 in the matrices, 2 x 4 x 10 for the head, 2 layers x 2 x 4 features x 3 tokens of length
    assert forward_flops(TOY, 3, 3) == 3 * (2 * 50 + 2 * 2 * 4 * 3)
    assert forward_flops(TOY, 3, 3, head=2) == forward_flops(TOY, 3, 3) + 2 * 2 * 40
    assert learning_flops(TOY, FullTuning(), 3, 3) == 3 * forward_flops(TOY, 3, 3)
    assert learning_flops(TOY, LoraTuning(), 3, 3) == 2 * forward_flops(TOY, 3, 3)
    # the backward pass ends at the second of two layers; embeddings that are trained are below both
    assert learning_flops(TOY, LoraTuning(last_layers=1), 3, 3) == 1.5 * forward_flops(TOY, 3, 3)
    low = LoraTuning(last_layers=1, save_modules=["embed_tokens"])
    assert learning_flops(TOY, low, 3, 3) == 2 * forward_flops(TOY, 3, 3)
