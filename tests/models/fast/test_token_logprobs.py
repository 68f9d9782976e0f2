"""Blockwise log-probabilities and entropies against plain autograd."""

import math

import pytest
import torch
from torch import nn

from align.models.fast import token_logprobs as module
from align.models.fast.token_logprobs import PLAIN, LogitTransform, token_logprobs, token_statistics


def plain(hidden, head, targets, temperature, transform=PLAIN):
    log_p = torch.log_softmax(transform.apply(head(hidden)) / temperature, dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2, torch.tensor([0.7, 1.0, 0.3, 2.0, 1.0, 0.5, 0.9])[:, None]])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [3, 1024])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(0.25), LogitTransform(0.5, cap=2.0)])
def test_values_and_gradients_equal_plain_autograd(monkeypatch, temperature, entropy_weight, tokens, transform):
    monkeypatch.setattr(module, "ROWS", 1)
    monkeypatch.setattr(module, "TOKENS", tokens)  # seven tokens: two full parts and a rest, or all at once
    monkeypatch.setitem(module.LOGITS, "cpu", 1)  # blocks of 256 words: two, and a rest of 188
    torch.manual_seed(0)
    head = nn.Linear(8, 700, bias=False)
    hidden = torch.randn(7, 8, requires_grad=True)
    targets = torch.tensor([0, 255, 256, 300, 511, 512, 699])
    weights = torch.randn(7)
    results = []
    for function in (token_logprobs, plain):
        hidden.grad = head.weight.grad = None
        logprobs, entropies = function(hidden, head, targets, temperature, transform)
        ((logprobs * weights).sum() + entropy_weight * (entropies * weights).sum()).backward()
        results.append((logprobs, entropies, hidden.grad, head.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_scale_and_cap_enter_value_and_gradient():
    """Products (x, 0) with x = 2, scale 0.5, cap 2, temperature 0.5: worked by hand.

    Logits 2 tanh(0.5 x / 2) / 0.5 = 4 tanh(0.5) = 1.848469 and 0; p = 1 / (1 + e^-1.848469) = 0.863951.
    log p = -0.146239; d log p / d x = (1 - p) * 4 * 0.25 * (1 - tanh(0.5)^2) = 0.136049 * 0.786448 = 0.106995.
    """
    hidden = torch.tensor([[2.0]], requires_grad=True)
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[1.0], [0.0]])
    logprobs, _ = token_logprobs(hidden, head, torch.tensor([0]), 0.5, LogitTransform(0.5, cap=2.0))
    logprobs.sum().backward()
    assert logprobs.item() == pytest.approx(-0.146239, abs=1e-5)
    assert hidden.grad.item() == pytest.approx(0.106995, abs=1e-5)


@pytest.fixture
def fresh_memory_is_nan():
    """Have torch fill memory that it has not written with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize("count", [0, 5, 130])
def test_every_word_of_the_weight_s_gradient_is_written(monkeypatch, count):
    monkeypatch.setattr(module, "TOKENS", 128)
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    head = nn.Linear(8, 700, bias=False)
    hidden, targets = torch.randn(count, 8), torch.randint(0, 700, (count,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        token_logprobs(hidden, head, targets, 1.0)[0].sum().backward()
    expected = torch.softmax(hidden @ head.weight.T, dim=-1)
    expected = (nn.functional.one_hot(targets, 700) - expected).T @ hidden
    assert torch.allclose(head.weight.grad, expected, atol=0.05)


@pytest.mark.parametrize("index", [0, 400, 699])
def test_one_word_far_above_the_others_wherever_it_is(monkeypatch, index):
    monkeypatch.setitem(module.LOGITS, "cpu", 1)
    head = nn.Linear(1, 700, bias=False)
    head.weight.data.zero_()[index] = 3e4
    logprobs, entropies = token_logprobs(torch.ones(2, 1), head, torch.tensor([index, 5]), 1.0)
    assert logprobs.tolist() == [0.0, -3e4]
    assert entropies.tolist() == [0.0, 0.0]
    head.weight.data.zero_()
    logprobs, entropies = token_logprobs(torch.ones(1, 1), head, torch.tensor([index]), 1.0)
    assert logprobs.item() == pytest.approx(-math.log(700)) == -entropies.item()


def test_a_head_that_is_not_plain_still_works():
    torch.manual_seed(0)
    head = nn.Linear(8, 11, bias=True)
    hidden, targets = torch.randn(7, 8), torch.randint(0, 11, (7,))
    for ours, theirs in zip(token_logprobs(hidden, head, targets, 0.5), plain(hidden, head, targets, 0.5), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_softmax_is_float32_under_autocast():
    head = nn.Linear(8, 11, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropies = token_logprobs(torch.randn(5, 8), head, torch.zeros(5, dtype=torch.long), 1.0)
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert (entropies > 0).all()


def test_micro_batches_have_products_of_equal_shapes(monkeypatch):
    shapes = []
    blocks = module._blocks

    def record(hidden, weight, transform):
        for block, logits in blocks(hidden, weight, transform):
            shapes.append(tuple(logits.shape))
            yield block, logits

    monkeypatch.setattr(module, "_blocks", record)
    monkeypatch.setattr(module, "LOGITS", {"cpu": 2**15, "cuda": 2**15})
    weight = torch.randn(1024, 8)
    for count in (65, 90, 128):
        hidden = torch.randn(count, 8)
        statistics = token_statistics(hidden, weight, torch.arange(count), torch.full((count, 1), 2.0))
        expected = torch.log_softmax(hidden @ weight.T / 2.0, dim=-1).diagonal()
        torch.testing.assert_close(statistics.logprobs, expected)
        assert all(len(column) == count for column in statistics)
    assert set(shapes) == {(128, 256)}
