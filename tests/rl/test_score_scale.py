"""The running scale of scores, worked by hand and against all scores at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.rl.score_scale import RunningScale


def test_mean_and_deviation_of_all_scores_so_far():
    scale = RunningScale()
    scale.add(torch.tensor([1.0, 3.0]))
    # mean 2, variance 1
    assert scale.apply(torch.tensor([4.0])).tolist() == [2.0]
    scale.add(torch.tensor([5.0, 7.0]))
    # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    assert scale.std == pytest.approx(5**0.5)
    assert scale.apply(torch.tensor([4.0, 9.0])).tolist() == pytest.approx([0.0, 5**0.5])


def test_scores_that_are_all_the_same_become_zero():
    scale = RunningScale()
    scale.add(torch.tensor([3.0, 3.0]))
    assert scale.apply(torch.tensor([3.0, 4.0])).tolist() == [0.0, 1.0]


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=6))
def test_batches_count_as_one(batches):
    scale = RunningScale()
    for batch in batches:
        scale.add(torch.tensor(batch, dtype=torch.float64))
    every = torch.tensor([score for batch in batches for score in batch], dtype=torch.float64)
    assert scale.mean == pytest.approx(every.mean().item(), abs=1e-9)
    assert scale.std == pytest.approx(every.std(correction=0).item(), abs=1e-6)


def test_it_goes_on_from_its_state():
    first, second = RunningScale(), RunningScale()
    first.add(torch.tensor([1.0, 2.0, 4.0]))
    second.load_state_dict(first.state_dict())
    for scale in (first, second):
        scale.add(torch.tensor([8.0]))
    assert first.state_dict() == second.state_dict()


def test_scores_before_any_came_pass_unchanged():
    scale = RunningScale()
    assert scale.std == 0.0
    assert scale.apply(torch.tensor([3.0, -2.0])).tolist() == [3.0, -2.0]


def test_processes_count_as_one():
    """The reduction sees counts and sums first, then squares around the mean of all."""
    full, part = RunningScale(), RunningScale()
    full.add(torch.tensor([1.0, 2.0, 6.0, 7.0]))
    others = iter([torch.tensor([2.0, 13.0], dtype=torch.float64), torch.tensor(13.0, dtype=torch.float64)])
    part.add(torch.tensor([1.0, 2.0]), lambda total: total + next(others))  # (6 - 4)^2 + (7 - 4)^2 = 13
    assert part.state_dict() == pytest.approx(full.state_dict())
