"""The head in blocks that stands in for trl's: its numbers and gradients, and the names of trl that it replaces."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import trl.trainer.utils
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

from align.models.fast import token_logprobs
from align.training import fused_head
from align.training.fused_head import use_blockwise_head

SETTINGS = (32768, 4.0, 0.5)
"""trl's tile, soft cap and factor of the logits."""


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(700, 8, requires_grad=True)
    with torch.no_grad():
        weight[20] *= 10
        weight[300] = weight[20]  # equal logits: the first of them is the likeliest
    return hidden, weight, torch.tensor([0, 20, 300, 255, 256, 511, 512, 699, 5])


@pytest.mark.parametrize("names", [("entropy", "is_top1"), ("mean_logits",), ()])
def test_numbers_and_gradients_are_trl_s(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_logprobs, "TOKENS", 4)
    monkeypatch.setitem(token_logprobs.LOGITS, "cpu", 1)
    results: list[list[Any]] = []
    for function in (ChunkedLogProbFunction, fused_head._BlockwiseHead):
        hidden, weight, targets = inputs()
        outputs = function.apply(hidden, weight, None, targets, 0.7, *SETTINGS, names)
        loss = (outputs[0] * torch.arange(1, 10)).sum()
        if outputs[1] is not None:
            loss = loss + 0.3 * outputs[1].sum()
        loss.backward()
        results.append([*outputs, hidden.grad, weight.grad])
    for theirs, ours in zip(*results, strict=True):
        assert (theirs is None) == (ours is None)
        assert theirs is None or torch.allclose(theirs.float(), ours.float(), atol=1e-4)


def test_the_likeliest_token_is_the_first_of_equals() -> None:
    hidden, weight, _ = inputs()
    with torch.no_grad():
        hidden[:] = weight[20]  # tokens 20 and 300 tie
    targets = torch.tensor([20, 300, 5, 20, 300, 5, 20, 300, 5])
    outputs = fused_head._BlockwiseHead.apply(hidden, weight, None, targets, 1.0, *SETTINGS, ("is_top1",))
    assert outputs[4].tolist() == [True, False, False] * 3


@pytest.mark.parametrize(("bias", "names"), [(torch.zeros(700), ()), (None, ("log_sum_sq_probs",))])
def test_heads_of_another_kind_keep_trl_s_function(
    bias: Any, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("computed in blocks")

    monkeypatch.setattr(fused_head, "token_statistics", fail)
    hidden, weight, targets = inputs()
    outputs = fused_head._BlockwiseHead.apply(hidden, weight, bias, targets, 1.0, *SETTINGS, names)
    assert outputs[0].shape == (9,)


def test_plain_head_on_a_cpu_is_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("computed by trl")

    monkeypatch.setattr(fused_head.ChunkedLogProbFunction, "apply", fail)
    # The logits of both tokens are (1, 0) / 0.5, so softmax gives e^2 / (e^2 + 1) and 1 / (e^2 + 1).
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    outputs = fused_head._BlockwiseHead.apply(
        hidden, torch.eye(2), None, torch.tensor([0, 1]), 0.5, 32768, None, 1.0, ()
    )
    normalizer = math.log(math.exp(2) + 1)
    assert outputs[0].tolist() == pytest.approx([2 - normalizer, -normalizer])


def test_trl_still_has_the_names_and_arguments_that_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_use_triton", "_ChunkedLogProbFunction"):
        monkeypatch.setattr(trl.trainer.utils, name, getattr(trl.trainer.utils, name))
    use_blockwise_head()
    source = inspect.getsource(trl.trainer.utils.add_fused_lm_head)
    assert "compact = _use_triton(hidden_states.device)" in source
    assert "per_token = _ChunkedLogProbFunction.apply(" in source
    parameters = list(inspect.signature(ChunkedLogProbFunction.forward).parameters)[1:]
    expected = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size"]
    assert parameters == [*expected, "final_logit_softcapping", "logit_scale", "outputs"]
    assert OPTIONAL_OUTPUTS == ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    assert trl.trainer.utils._use_triton(torch.device("cpu")) is True
