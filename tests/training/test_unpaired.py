"""Rows for KTO: pairs taken apart, answers to other prompts beside them, micro-batches that stay together."""

from __future__ import annotations

from pathlib import Path

from align.models.loading import load_tokenizer
from align.training.rows import NO_ROOM, TOO_LONG
from align.training.unpaired import GroupOrder, add_mismatched, encode_unpaired, fixed_groups, unpair
from tests.support.training.harness import rows


def test_a_pair_becomes_a_wanted_and_an_unwanted_answer() -> None:
    pair = {**rows(1)[0], "rejected_finished": False}
    single = {"id": "s", "prompt": pair["prompt"], "completion": pair["chosen"], "label": False}
    wanted, unwanted, kept = unpair([pair, single])
    assert (wanted["completion"], wanted["label"]) == (pair["chosen"], True)
    assert (unwanted["completion"], unwanted["label"]) == (pair["rejected"], False)
    assert (wanted["completion_finished"], unwanted["completion_finished"]) == (None, False)
    assert "chosen" not in wanted and "rejected_score" not in wanted
    assert kept is single


def test_answers_are_left_out_not_cut_and_a_cut_answer_has_no_end(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    whole = encode_unpaired(tokenizer, unpair(rows(4)), 128)
    assert len(whole.rows) == 8 and not whole.counts
    assert all(row["completion_ids"][-1] == tokenizer.eos_token_id for row in whole.rows)
    cut = encode_unpaired(tokenizer, unpair([{**rows(1)[0], "rejected_finished": False}]), 128)
    assert cut.rows[1]["completion_ids"] == whole.rows[1]["completion_ids"][:-1]
    longest = max(whole.lengths)
    assert encode_unpaired(tokenizer, unpair(rows(4)), longest - 1).counts == {TOO_LONG: whole.lengths.count(longest)}
    assert encode_unpaired(tokenizer, unpair(rows(1)), 5).counts == {NO_ROOM: 2}


def test_a_mismatched_answer_is_of_the_same_group_and_another_prompt(tiny_model: Path) -> None:
    encoded = encode_unpaired(load_tokenizer(tiny_model), unpair(rows(16)), 128)
    made = [dict(row) for row in encoded.rows]
    groups = fixed_groups(encoded.lengths, 4, 8, 7)
    assert sorted(row for group in groups for row in group) == list(range(32))
    assert add_mismatched(made, groups, 128) == 0
    for group in groups:
        given = [made[row]["KL_completion_ids"] for row in group]
        assert sorted(given) == sorted(made[row]["completion_ids"] for row in group)
        for row in group:
            donors = [at for at in group if made[at]["completion_ids"] == made[row]["KL_completion_ids"]]
            assert any(made[at]["prompt_ids"] != made[row]["prompt_ids"] for at in donors)


def test_two_sides_of_one_pair_are_moved_past_one_another() -> None:
    def row(prompt: int, answer: int) -> dict[str, list[int]]:
        return {"prompt_ids": [prompt], "completion_ids": [answer] * 9}

    made = [row(1, 10), row(1, 11), row(2, 12), row(2, 13)]
    assert add_mismatched(made, [[0, 1, 2, 3]], 6) == 0  # by one place, two would come back to their own prompt
    assert [one["KL_completion_ids"] for one in made] == [[12] * 5, [13] * 5, [10] * 5, [11] * 5]  # and fit in 6
    assert add_mismatched(made[:2], [[0, 1]], 20) == 2  # no other prompt there is


def test_a_group_of_one_borrows_from_the_one_before() -> None:
    made = [{"prompt_ids": [at], "completion_ids": [at]} for at in range(3)]
    assert add_mismatched(made, [[0, 1], [2]], 20) == 0
    assert made[2]["KL_completion_ids"] == [0]


def test_epochs_shuffle_groups_and_keep_them() -> None:
    groups = [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    order = GroupOrder(groups, 3)
    seen = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        rows_ = list(order)
        assert rows_[-1] == 8 and len(order) == 9
        assert {tuple(rows_[at : at + 2]) for at in range(0, 8, 2)} == {tuple(group) for group in groups[:4]}
        seen.append(rows_)
    assert seen[0] == seen[2] != seen[1]
