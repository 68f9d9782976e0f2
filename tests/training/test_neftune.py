"""NEFTune: noise of the paper's size, of each row's own length, in training alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from align.config.tuning import LoraTuning
from align.models.loading import load_policy
from align.models.tuning.apply import apply_tuning
from align.training.packing import FlatCollator, enable_flat
from align.training.sft_trainer import NoisyEmbeddings
from align.training.trainers import row_lengths


def embedded(model: object, **batch: torch.Tensor) -> torch.Tensor:
    calls = []
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[attr-defined]
    layer = plain.base_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        model(**batch)  # type: ignore[operator]
    hook.remove()
    return calls[0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_noise_has_the_size_of_each_row(lora: bool, tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    if lora:
        model = apply_tuning(model, LoraTuning(rank=2), 0)
    ids = torch.arange(4, 4 + 128).reshape(2, 64) % 200
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    clean = embedded(model.eval(), **batch)
    noise = NoisyEmbeddings(model, 5.0)
    assert torch.equal(embedded(model.eval(), **batch), clean)
    torch.manual_seed(0)
    added = embedded(model.train(), **batch) - clean
    size = clean.shape[-1]
    for row, length in ((0, 64), (1, 16)):
        most = 5.0 / math.sqrt(length * size)
        assert 0.97 * most < float(added[row].abs().max()) <= most * 1.001
        assert float(added[row].std()) == pytest.approx(most / math.sqrt(3), rel=0.05)
    torch.manual_seed(0)
    assert torch.equal(embedded(model.train(), **batch) - clean, added)
    noise.remove()
    assert torch.equal(embedded(model.train(), **batch), clean)


def test_rows_in_one_line_have_their_own_noise(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    enable_flat(model, "ragged")
    lengths = [100, 4]
    batch = FlatCollator("ragged")([{"input_ids": list(range(4, 4 + n)), "labels": [0] * n} for n in lengths])
    batch.pop("labels")
    clean = embedded(model.eval(), **batch)
    NoisyEmbeddings(model, 5.0)
    added = (embedded(model.train(), **batch) - clean)[0]
    for part, length in ((added[:100], 100), (added[100:], 4)):
        most = 5.0 / math.sqrt(length * clean.shape[-1])
        assert 0.9 * most < float(part.abs().max()) <= most * 1.001


def test_lengths_are_read_from_positions() -> None:
    assert row_lengths(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [3, 1, 2]
