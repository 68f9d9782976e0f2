"""The maths of merging on small tensors, sums worked by hand, and held against the papers' definitions."""

from __future__ import annotations

import math

import pytest
import torch

from align.models import merging as methods


def test_linear_is_the_weighted_sum() -> None:
    merged = methods.linear([torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])], [0.25, 0.75])
    assert merged.tolist() == [2.5, -1.0]  # 0.25 + 2.25, 0.5 - 1.5


def test_slerp_keeps_to_the_circle() -> None:
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    third = methods.slerp(first, second, 1 / 3)
    # 90 degrees apart: a third of the way is 30 degrees
    assert third.flatten().tolist() == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    assert methods.slerp(first, second, 0.0).equal(first)
    assert torch.allclose(methods.slerp(first, second, 1.0), second, atol=1e-6)
    # lengths 3 and 1: at half way sin(45) * (3, 0) + sin(45) * (0, 1), over sin(90)
    assert methods.slerp(3 * first, second, 0.5).flatten().tolist() == pytest.approx([3 * 0.5**0.5, 0.5**0.5])


def test_slerp_of_parallel_or_zero_vectors_is_the_straight_line() -> None:
    direction = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(methods.slerp(direction, 2 * direction, 0.25), 1.25 * direction)
    assert torch.allclose(methods.slerp(direction, torch.zeros(3), 0.25), 0.75 * direction)
    assert torch.isfinite(methods.slerp(direction, -direction, 0.5)).all()
    for seed in range(20):  # rounding puts the cosine of some of these with themselves above 1
        vector = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(methods.slerp(vector, vector, 0.3), vector)


def test_warp_keeps_the_length_that_an_average_loses() -> None:
    vectors = [torch.eye(4)[index] for index in range(3)]
    merged = methods.warp(vectors)
    assert float(merged.norm()) == pytest.approx(1.0, abs=1e-6)
    assert float(methods.linear(vectors, [1 / 3] * 3).norm()) == pytest.approx(1 / 3**0.5)
    # half way between the first two, then a third of the way, 30 degrees, to the last
    side = math.cos(math.pi / 6) / 2**0.5
    assert merged.tolist() == pytest.approx([side, side, 0.5, 0.0], abs=1e-6)
    assert methods.warp(vectors[:1]).equal(vectors[0])


def test_ties_trims_elects_and_averages_those_that_agree() -> None:
    first = torch.tensor([4.0, 0.1, -2.0, 0.2])
    second = torch.tensor([2.0, -3.0, 0.3, -0.1])
    # half of each is kept: (4, 0, -2, 0) and (2, -3, 0, 0)
    assert methods.ties([first, second], [1, 1], 0.5).tolist() == pytest.approx([3.0, -3.0, -2.0, 0.0])
    # all kept: signs + - - +; those that agree: (4 + 2) / 2, -3, -2, 0.2
    assert methods.ties([first, second], [1, 1], 1.0).tolist() == pytest.approx([3.0, -3.0, -2.0, 0.2])
    # the first counts double: its entries are twice as large, who agrees is the same
    assert methods.ties([first, second], [2, 1], 0.5).tolist() == pytest.approx([5.0, -3.0, -4.0, 0.0])
    assert methods.ties([first, second], [2, 1], 1.0).tolist() == pytest.approx([5.0, -3.0, -4.0, 0.4])


@pytest.mark.parametrize("elect", [False, True])
def test_dare_keeps_the_expected_value_and_repeats_itself(elect: bool) -> None:
    vector = torch.ones(20_000)
    state = torch.get_rng_state()
    merged = methods.dare([vector, vector], [0.5, 0.5], 0.25, seed=3, elect=elect)
    assert torch.get_rng_state().equal(state)
    assert merged.equal(methods.dare([vector, vector], [0.5, 0.5], 0.25, seed=3, elect=elect))
    assert not merged.equal(methods.dare([vector, vector], [0.5, 0.5], 0.25, seed=4, elect=elect))
    if elect:  # an entry that one of them keeps is 4 * 0.5; both kept average to the same
        assert set(merged.tolist()) == {0.0, 2.0}
        assert float((merged > 0).float().mean()) == pytest.approx(1 - 0.75**2, abs=0.02)
    else:  # each entry is kept with 1/4 and scaled by 4
        assert set(merged.tolist()) == {0.0, 2.0, 4.0}
        assert float(merged.mean()) == pytest.approx(1.0, abs=0.05)


def test_a_tensors_seed_is_its_own() -> None:
    assert methods.seed_of(1, "a") == methods.seed_of(1, "a")
    assert len({methods.seed_of(seed, name) for seed in (1, 2) for name in "abc"}) == 6


def test_dare_that_drops_nothing_only_adds_or_elects() -> None:
    vectors = [torch.tensor([4.0, -2.0]), torch.tensor([2.0, 1.0])]
    assert methods.dare(vectors, [0.5, 0.25], 1.0, seed=0, elect=False).tolist() == [2.5, -0.75]
    # elected: + and -; those that agree: (0.5 * 4 + 0.25 * 2) / 2, 0.5 * -2
    assert methods.dare(vectors, [0.5, 0.25], 1.0, seed=0, elect=True).tolist() == [1.25, -1.0]
