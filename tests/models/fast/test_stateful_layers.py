"""Rows of a line in layers with a state: states and gradients of single rows, also with prefixes that rows share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from align.models.fast.ragged_rows import can_run_ragged, enable_ragged, hidden_states, make_layout
from align.models.fast.shared_parts import share_prefixes
from align.models.fast.stateful_layers import MIXERS, carries_state
from tests.support.models.families import FAMILIES, family_config, family_model

PREFIX = list(range(20, 32))
ROWS = [[*PREFIX, *range(40, 60)], [*PREFIX, 61, 62, 63], [70, 71], [*PREFIX, *range(80, 95)], [72, 73, 74]]
"""Three groups by length: 32 and 27 tokens, 15, and 2 and 3."""


def ragged_model(model_type: str) -> Any:
    model = family_model(model_type).eval()
    assert can_run_ragged(model)
    enable_ragged(model)
    return model


def states_in_line(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return the states of each row, computed in one line with shared prefixes."""
    line, places = share_prefixes(rows)
    batch = line.batch()
    states = hidden_states(model.base_model, batch["input_ids"], batch["position_ids"], batch["layout"])
    return [states[row] for row in places]


def single_states(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    return [model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows]


def gradients(model: Any, states: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.randn(64, states[0].shape[-1], generator=torch.Generator().manual_seed(1))
    torch.stack([(row * weights[: len(row)]).sum() for row in states]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", MIXERS)
def test_shared_prefixes_of_hybrids_equal_single_rows(model_type: str) -> None:
    model = ragged_model(model_type)
    actual, expected = states_in_line(model, ROWS), single_states(model, ROWS)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    actual_gradients, expected_gradients = gradients(model, actual), gradients(model, expected)
    assert actual_gradients.keys() == expected_gradients.keys()
    scale = max(float(value.abs().max()) for value in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert float((actual_gradients[name] - gradient).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("model_type", MIXERS)
def test_no_state_crosses_rows(model_type: str) -> None:
    model = ragged_model(model_type)
    layout = make_layout([6, 6])
    positions = torch.arange(6).repeat(2)[None]
    lines = [torch.tensor([[*first, 7, 8, 9, 10, 11, 12]]) for first in ([20] * 6, [30] * 6)]
    with torch.no_grad():
        first, second = (hidden_states(model.base_model, ids, positions, layout)[6:] for ids in lines)
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
        # Without the layout the last row sees the first, in attention and in the state.
        leaking = [model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, 6:] for ids in lines]
        assert float((leaking[0] - leaking[1]).abs().max()) > 1e-3


def test_checkpointed_layers_gather_rows_again() -> None:
    model = ragged_model("qwen3_next")
    expected = gradients(model, states_in_line(model, ROWS))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    actual = gradients(model, states_in_line(model, ROWS))
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)


def test_copy_computes_rows_with_its_own_weights() -> None:
    model = ragged_model("lfm2")
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.mul_(1.5)
        actual, expected = states_in_line(duplicate, ROWS), single_states(duplicate, ROWS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_every_stateful_family_is_named_or_refused() -> None:
    """Mamba 2's trunk has no attention and accepts no layout, so it stays padded."""
    stateful = {name for name in FAMILIES if carries_state(family_config(name))}
    assert stateful - MIXERS.keys() == {"mamba2"}
    assert not can_run_ragged(family_model("mamba2"))
