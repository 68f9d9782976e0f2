"""Divergences between a student's and a teacher's distributions, against sums over the whole vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from align.models.fast.token_logprobs import PLAIN, LogitTransform
from align.training.divergence import CHUNK, Live, Measure, TopTokens, summed_divergence, summed_kl, with_rest

STUDENT, TEACHER = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p * (p / q).log()).sum())


def test_forward_and_reverse_differ_in_whose_distribution_weighs() -> None:
    student, teacher = STUDENT.log(), TEACHER.log()
    # 0.2 ln(0.2 / 0.5) + 0.2 ln(0.2 / 0.3) + 0.6 ln(0.6 / 0.2)
    forward = 0.2 * math.log(0.4) + 0.2 * math.log(2 / 3) + 0.6 * math.log(3)
    assert Measure("forward").of(student, teacher).item() == pytest.approx(forward, abs=1e-6)
    assert Measure("reverse").of(student, teacher).item() == pytest.approx(kl(STUDENT, TEACHER), abs=1e-6)


def test_kl_to_a_base_model_weighs_by_the_base() -> None:
    # Heads that return log-probabilities as logits, so the softmax gives the probabilities back.
    base, student = TEACHER.log().repeat(2, 1), STUDENT.log().repeat(2, 1)
    actual = summed_kl(base, nn.Identity(), student, nn.Identity())
    # Two tokens of 0.2 ln(0.2 / 0.5) + 0.2 ln(0.2 / 0.3) + 0.6 ln(0.6 / 0.2) nats.
    assert float(actual) == pytest.approx(2 * (0.2 * math.log(0.4) + 0.2 * math.log(2 / 3) + 0.6 * math.log(3)))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_beta_is_the_teachers_share_of_the_mixture(beta: float) -> None:
    mixture = beta * TEACHER + (1 - beta) * STUDENT
    expected = beta * kl(TEACHER, mixture) + (1 - beta) * kl(STUDENT, mixture)
    assert Measure("jsd", beta).of(STUDENT.log(), TEACHER.log()).item() == pytest.approx(expected, abs=1e-6)


def test_the_cap_comes_before_the_temperature() -> None:
    logits = torch.tensor([[8.0, 1.0, -3.0]])
    expected = torch.log_softmax(5 * torch.tanh(logits / 5) / 2, dim=-1)
    assert torch.allclose(Measure(temperature=2.0).log_softmax(logits, LogitTransform(cap=5.0)), expected)
    assert torch.allclose(Measure(temperature=2.0).log_softmax(logits), torch.log_softmax(logits / 2, dim=-1))


def test_all_other_tokens_count_as_one() -> None:
    rest = with_rest(torch.tensor([[0.5, 0.3], [0.7, 0.3]]).log())
    assert rest[0].exp().tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert 0 < float(rest[1, 2].exp()) < 1e-6  # nothing is left, and its logarithm is finite


def both(rows: int = 11) -> tuple[torch.Tensor, torch.Tensor, nn.Linear, nn.Linear]:
    """States of student and teacher over two chunks, and heads of which the teacher's has ``rows``."""
    torch.manual_seed(0)
    count = CHUNK + 7
    return torch.randn(count, 8), torch.randn(count, 6), nn.Linear(8, 11, bias=False), nn.Linear(6, rows, bias=False)


@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(scale=0.5, cap=3.0)])
@pytest.mark.parametrize("rows", [9, 11, 14])
def test_a_live_teacher_in_chunks_is_one_over_all_common_tokens(rows: int, transform: LogitTransform) -> None:
    hidden, states, head, teacher_head = both(rows)
    measure = Measure("jsd", 0.3, temperature=1.5)
    common = min(11, rows)
    student = measure.log_softmax(head(hidden)[:, :common], transform)
    teacher = measure.log_softmax(teacher_head(states)[:, :common])
    actual = summed_divergence(measure, hidden, head, Live(states, teacher_head), transform)
    assert float(actual) == pytest.approx(float(measure.of(student, teacher).sum()), rel=1e-5)


def test_kept_tokens_give_what_a_live_teacher_gives_with_as_many() -> None:
    hidden, states, head, teacher_head = both()
    measure = Measure("forward", temperature=2.0, top_k=3)
    best = measure.log_softmax(teacher_head(states)).topk(3, dim=-1)
    live = summed_divergence(measure, hidden, head, Live(states, teacher_head))
    remaining = summed_divergence(measure, hidden, head, TopTokens(best.indices, best.values.detach()))
    assert float(remaining) == pytest.approx(float(live), rel=1e-5)
    # what is measured is a lower bound of the whole, and not all of it
    full = summed_divergence(Measure("forward", temperature=2.0), hidden, head, Live(states, teacher_head))
    assert 0 < float(live) < 0.999 * float(full)


def test_the_gradient_reaches_the_student_alone() -> None:
    hidden, states, head, teacher_head = both()
    hidden.requires_grad_(True)
    states.requires_grad_(True)
    summed_divergence(Measure(), hidden, head, Live(states, teacher_head)).backward()
    assert hidden.grad is not None and hidden.grad.abs().min(dim=0).values.max() > 0
    assert head.weight.grad is not None
    assert states.grad is None and teacher_head.weight.grad is None
