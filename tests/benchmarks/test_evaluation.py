"""The meter of an evaluation's passes: tokens without padding, and no time of loading."""

from __future__ import annotations

import time

import torch
from torch import nn

from benchmarks.evaluation import Meter


class Trunk(nn.Module):
    """Takes what a trunk takes."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return input_ids


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_model = Trunk()


def test_padding_is_not_counted_and_neither_is_loading() -> None:
    meter = Meter()

    def load() -> Model:
        time.sleep(0.2)
        return Model()

    def read() -> None:
        model = meter.loaded(load)()
        ids = torch.zeros(2, 5, dtype=torch.long)
        model.base_model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
        # The mask of a line of tokens is a marker, of another shape than the ids.
        model.base_model(input_ids=ids[:1], attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))

    meter.timed("reading", read)()
    assert meter.work["reading"].tokens == 8 + 5
    assert meter.loading.seconds >= 0.2 > meter.work["reading"].seconds
