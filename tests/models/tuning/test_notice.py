"""What a stage says before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.config.tuning import FullTuning, LoraTuning, QloraTuning
from align.models.loading import load_policy
from align.models.tuning.apply import apply_tuning, notice, parameter_counts
from tests.support.models.tuning.tuning_cases import wrapped

LAYERS = 2 * (4 * 64 * 64 + 3 * 64 * 128)
WHOLE = 260 * 64 + LAYERS + 5 * 64
ADAPTERS = 4 * 2 * (4 * 128 + 3 * 192)


@pytest.mark.parametrize("tuning", [LoraTuning(rank=4), QloraTuning(rank=4)], ids=["lora", "qlora"])
def test_four_bits_count_as_the_weights_they_stand_for(tuning: LoraTuning | QloraTuning, tiny_model: Path) -> None:
    assert parameter_counts(wrapped(tiny_model, tuning)) == (ADAPTERS, WHOLE + ADAPTERS)


def test_the_line_by_hand(tiny_model: Path) -> None:
    model = apply_tuning(load_policy(tiny_model), LoraTuning(rank=4), 0)
    # a layer: two norms, inputs of attention and MLP, queries to outputs, gate to product, seven times the rank
    activations = 4 * (2 * (2 * 64 + 2 * 64 + 4 * 64 + 4 * 128 + 7 * 4) + 64)
    needed = 4 * (WHOLE + ADAPTERS) + 12 * ADAPTERS
    assert notice(model, LoraTuning(rank=4), "float32") == (
        f"lora r4: {ADAPTERS:,} of {WHOLE + ADAPTERS:,} parameters are trained (8.09 %); about "
        f"{needed / 2**20:.2f} MiB for weights, gradients and AdamW, "
        f"and {1000 * activations / 2**20:,.0f} MiB per 1,000 tokens of a micro-batch for activations"
    )
    low = needed + 2 * (LAYERS + 260 * 64 + ADAPTERS)
    assert f"about {low / 2**20:.2f} MiB" in notice(model, LoraTuning(rank=4), "bfloat16")


def test_notice_counts_only_trained_weights(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    assert f"full: {WHOLE:,} of {WHOLE:,} parameters are trained (100 %)" in notice(model, FullTuning(), "float32")
    model.model.embed_tokens.requires_grad_(False)
    assert f"full: {LAYERS + 320:,} of {WHOLE:,}" in notice(model, FullTuning(), "float32")
    assert torch.is_grad_enabled()


def test_a_schedule_needs_memory_for_what_is_open_at_once(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    actual = notice(model, FullTuning(), "float32", max_trained=LAYERS)
    share = f"({100 * LAYERS / WHOLE:.3g} %)"
    assert f"at most {LAYERS:,} of {WHOLE:,} parameters are trained in one step {share}" in actual
    assert f"about {(4 * WHOLE + 12 * LAYERS) / 2**20:.2f} MiB for weights" in actual
