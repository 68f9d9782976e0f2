"""Why weights are float32 masters: a small update that bfloat16 weights lose survives here."""

from __future__ import annotations

from pathlib import Path

import torch

from align.models.loading import load_policy
from align.models.precision import autocast

RATE = 1e-6
IDS = torch.tensor([[1, 40, 41, 42]])


def _step(model: torch.nn.Module) -> float:
    """Share of the output projection's weights that one AdamW step at a usual PPO learning rate changes."""
    weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    before = weight.detach().clone()
    with autocast("cpu", "bfloat16"):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0).step()
    return (weight.detach() != before).float().mean().item()


def test_small_update_survives_in_float32_and_is_lost_in_bfloat16(tiny_model: Path) -> None:
    # AdamW's first step moves each weight by the rate, 1e-6. A weight near 0.1 has neighbours 2**-12 = 2e-4 apart in
    # bfloat16, 7e-9 in float32.
    assert _step(load_policy(tiny_model)) > 0.95
    assert _step(load_policy(tiny_model, torch.bfloat16)) < 0.05


def test_autocast_rounds_products_only(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    with torch.no_grad():
        with autocast("cpu", "bfloat16"):
            assert model(IDS).logits.dtype == torch.bfloat16
        with autocast("cpu", "float32"):
            assert model(IDS).logits.dtype == torch.float32
    assert model.dtype == torch.float32
