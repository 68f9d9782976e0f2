"""Rows for KTO: pairs taken apart, answers to other prompts beside them, micro-batches that stay together."""

from __future__ import annotations

from pathlib import Path

from align.models.loading import load_tokenizer
from align.training.rows import NO_ROOM, TOO_LONG
from align.training.unpaired import GroupOrder, add_mismatched, encode_unpaired, fixed_groups, unpair
from tests.support.training.harness import rows


def test_a_pair_becomes_a_desirable_and_an_undesirable_answer() -> None:
    pair = {**rows(1)[0], "rejected_finished": False}
    single = {"id": "s", "prompt": pair["prompt"], "completion": pair["chosen"], "label": False}
    desirable, undesirable, remaining = unpair([pair, single])
    assert (desirable["completion"], desirable["label"]) == (pair["chosen"], True)
    assert (undesirable["completion"], undesirable["label"]) == (pair["rejected"], False)
    assert (desirable["completion_finished"], undesirable["completion_finished"]) == (None, False)
    assert "chosen" not in desirable and "rejected_score" not in desirable
    assert remaining is single


def test_long_answers_are_skipped_and_cut_answers_have_no_end(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    full = encode_unpaired(tokenizer, unpair(rows(4)), 128)
    assert len(full.rows) == 8 and not full.counts
    assert all(row["completion_ids"][-1] == tokenizer.eos_token_id for row in full.rows)
    cut = encode_unpaired(tokenizer, unpair([{**rows(1)[0], "rejected_finished": False}]), 128)
    assert cut.rows[1]["completion_ids"] == full.rows[1]["completion_ids"][:-1]
    longest = max(full.lengths)
    assert len(encode_unpaired(tokenizer, unpair(rows(4)), longest).rows) == 8
    assert encode_unpaired(tokenizer, unpair(rows(4)), longest - 1).counts == {TOO_LONG: full.lengths.count(longest)}
    assert encode_unpaired(tokenizer, unpair(rows(1)), 5).counts == {NO_ROOM: 2}


def test_mismatched_answer_is_of_its_group_and_another_prompt(tiny_model: Path) -> None:
    encoded = encode_unpaired(load_tokenizer(tiny_model), unpair(rows(16)), 128)
    new_rows = [dict(row) for row in encoded.rows]
    groups = fixed_groups(encoded.lengths, 4, 8, 7)
    assert sorted(row for group in groups for row in group) == list(range(32))
    assert add_mismatched(new_rows, groups, 128) == 0
    for group in groups:
        inputs = [new_rows[row]["KL_completion_ids"] for row in group]
        assert sorted(inputs) == sorted(new_rows[row]["completion_ids"] for row in group)
        for row in group:
            donors = [
                index for index in group if new_rows[index]["completion_ids"] == new_rows[row]["KL_completion_ids"]
            ]
            assert any(new_rows[index]["prompt_ids"] != new_rows[row]["prompt_ids"] for index in donors)


def test_two_sides_of_one_pair_are_moved_past_one_another() -> None:
    def row(prompt: int, answer: int) -> dict[str, list[int]]:
        return {"prompt_ids": [prompt], "completion_ids": [answer] * 9}

    new_rows = [row(1, 10), row(1, 11), row(2, 12), row(2, 13)]
    assert add_mismatched(new_rows, [[0, 1, 2, 3]], 6) == 0  # by one place, two would come back to their own prompt
    assert [entry["KL_completion_ids"] for entry in new_rows] == [
        [12] * 5,
        [13] * 5,
        [10] * 5,
        [11] * 5,
    ]  # and fit in 6
    assert add_mismatched(new_rows[:2], [[0, 1]], 20) == 2  # no other prompt there is


def test_a_group_of_one_borrows_from_the_one_before() -> None:
    new_rows = [{"prompt_ids": [index], "completion_ids": [index]} for index in range(3)]
    assert add_mismatched(new_rows, [[0, 1], [2]], 20) == 0
    assert new_rows[2]["KL_completion_ids"] == [0]


def test_epochs_shuffle_groups_and_keep_them() -> None:
    groups = [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    order = GroupOrder(groups, 3)
    calls = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        rows_ = list(order)
        assert rows_[-1] == 8 and len(order) == 9
        assert {tuple(rows_[index : index + 2]) for index in range(0, 8, 2)} == {tuple(group) for group in groups[:4]}
        calls.append(rows_)
    assert calls[0] == calls[2] != calls[1]
