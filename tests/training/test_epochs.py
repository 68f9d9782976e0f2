"""An epoch's rows dealt out to processes: together they make the steps, and the loss, of one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.training.epochs import gather_uneven, micro_batches_of_rank


def test_by_hand() -> None:
    # Batches of 4 rows in micro-batches of 2, two processes: 9 rows make steps of 2, 2 and 1 micro-batches.
    sizes = {"micro_batch": 2, "batch": 4, "part": 2, "processes": 2}
    order = [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert micro_batches_of_rank(order, rank=0, **sizes) == [[(8, 1.0), (7, 1.0)], [(4, 1.0), (3, 1.0)], [(0, 2.0)]]
    # The last step's only row is the first process's; the other runs it for company, and the mean of 2 and 0 is 1.
    assert micro_batches_of_rank(order, rank=1, **sizes) == [[(6, 1.0), (5, 1.0)], [(2, 1.0), (1, 1.0)], [(0, 0.0)]]


def test_a_micro_batch_in_parts() -> None:
    # One process: one micro-batch of 4 and one of 1, whose means count alike. Two processes: parts of 2, 2 and 1 in two
    # rounds, so the mean over rounds and processes is a quarter of the sum: 2, 2, and 4 x 1/2 for each half.
    sizes = {"micro_batch": 4, "batch": 8, "part": 2, "processes": 2}
    first, second = (micro_batches_of_rank(range(5), rank=rank, **sizes) for rank in (0, 1))
    assert first == [[(0, 1.0), (1, 1.0)], [(4, 2.0)]]
    assert second == [[(2, 1.0), (3, 1.0)], [(0, 0.0), (1, 0.0)]]


@given(
    rows=st.integers(1, 60),
    part=st.integers(1, 4),
    parts=st.integers(1, 3),
    micros=st.integers(1, 4),
    processes=st.integers(1, 4),
    values=st.randoms(use_true_random=False),
)
def test_the_mean_over_processes_is_the_loss_of_one(rows, part, parts, micros, processes, values) -> None:
    micro, batch = part * parts, part * parts * micros * processes
    order = list(range(rows))
    values.shuffle(order)
    value = {row: values.uniform(-5, 5) for row in order}
    sizes = {"micro_batch": micro, "batch": batch, "part": part, "processes": processes}
    mine = [micro_batches_of_rank(order, rank=rank, **sizes) for rank in range(processes)]
    assert len({len(entry) for entry in mine}) == 1
    assert sorted(row for entry in mine for micro_rows in entry for row, share in micro_rows if share) == sorted(order)
    index = 0
    most = batch // (part * processes)  # passes of a whole step
    for start in range(0, rows, batch):
        step = order[start : start + batch]
        full = [step[i : i + micro] for i in range(0, len(step), micro)]
        expected = sum(sum(value[row] for row in entry) / len(entry) for entry in full) / len(full)
        rounds = min(most, len(mine[0]) - index)
        actual = 0.0
        for entry in mine:
            for micro_rows in entry[index : index + rounds]:
                share = micro_rows[0][1]
                actual += share * sum(value[row] for row, _ in micro_rows) / len(micro_rows)
        assert actual / (rounds * processes) == pytest.approx(expected, abs=1e-9)
        index += rounds


def test_gather_pads_and_cuts_rows_of_another_process() -> None:
    others = {"sizes": torch.tensor([3]), "rows": torch.tensor([[1.0], [2.0], [3.0]])}
    gathered: list[object] = []

    def gather(value: object) -> object:
        gathered.append(value)
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        return torch.cat([value, others["sizes" if value.dtype == torch.int64 else "rows"]])

    # This process has two rows, the other three: this one pads by a row, which is cut off again.
    rows = gather_uneven(gather)(torch.tensor([[8.0], [9.0]]))
    assert rows.tolist() == [[8.0], [9.0], [1.0], [2.0], [3.0]]
    assert [len(value) for value in gathered if isinstance(value, torch.Tensor)] == [1, 3]
    # A number and a nested value have no rows: they pass as they are.
    gathered.clear()
    scalar = torch.tensor(2.0)
    assert gather_uneven(gather)(scalar) is scalar
    assert gather_uneven(gather)({"a": 1}) == {"a": 1}
    assert gathered == [scalar, {"a": 1}]
