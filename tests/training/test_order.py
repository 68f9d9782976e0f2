"""Length-grouped order: every row once, little padding, a function of seed and epoch alone."""

import random

from hypothesis import given
from hypothesis import strategies as st

from align.training.order import GroupedOrder, by_length, grouped_order


def padding(order: list[int], lengths: list[int], size: int) -> int:
    batches = [order[index : index + size] for index in range(0, len(order), size)]
    return sum(
        max(lengths[row] for row in batch) * len(batch) - sum(lengths[row] for row in batch) for batch in batches
    )


@given(st.lists(st.integers(1, 200), min_size=1, max_size=150), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_every_row_comes_once(lengths: list[int], micro: int, epoch: int) -> None:
    assert sorted(grouped_order(lengths, micro, 4, 7, epoch)) == list(range(len(lengths)))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    lengths = [random.Random(0).randint(5, 90) for _ in range(100)]
    order = grouped_order(lengths, 4, 8, 1, 0)
    assert order == grouped_order(lengths, 4, 8, 1, 0)
    assert order != grouped_order(lengths, 4, 8, 1, 1)
    assert order != grouped_order(lengths, 4, 8, 2, 0)
    sampler = GroupedOrder(lengths, 4, 8, 1)
    sampler.set_epoch(1)
    assert list(sampler) == grouped_order(lengths, 4, 8, 1, 1)


def test_padding_falls_to_a_tenth() -> None:
    draw = random.Random(1)
    lengths = [draw.randint(10, 200) for _ in range(640)]
    shuffled = draw.sample(range(640), 640)
    assert padding(grouped_order(lengths, 8, 16, 0, 0), lengths, 8) < padding(shuffled, lengths, 8) / 10


def test_scoring_batches_hold_every_row_within_the_budget() -> None:
    lengths = [3, 50, 8, 8, 120, 1]
    batches = by_length(lengths, 100)
    assert sorted(row for batch in batches for row in batch) == list(range(6))
    assert batches[0] == [4]  # longer than the budget, so alone
    assert all(max(lengths[row] for row in batch) * len(batch) <= 100 for batch in batches[1:])


def test_a_group_stays_together_as_far_as_a_batch_has_room() -> None:
    lengths = [10] * 50 + [60, 60, 200]
    batches = by_length(lengths, 100, [range(50), [50, 51], [52]])
    assert sorted(row for batch in batches for row in batch) == list(range(53))
    assert batches[:2] == [[52], [50, 51]]  # a pair is not separated, though padded it has 120 tokens
    assert batches[2:] == [list(range(start, start + 10)) for start in range(0, 50, 10)]
