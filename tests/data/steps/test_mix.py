"""Mixtures: rows appear as often as weights, temperature or epochs say, and only training rows."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from align.config.recipe.step_settings import CapStep, MixStep
from align.data.steps.mix import OVER
from align.errors import UserError
from tests.support.data.steps.tables import decide, kept, row

ROWS = [row(f"a{i}", source=0) for i in range(8)] + [row(f"b{i}", source=1) for i in range(2)]
TRAIN = {"_split": np.array(["train"] * 10)}


def appearances(config, rows=ROWS, columns=TRAIN, **more):
    verdict = decide(MixStep(type="mix", **config), rows, columns=columns, **more)
    times = np.where(verdict.code < 0, verdict.times, 0)
    return [int(times[:8].sum()), int(times[8:].sum())], verdict


def test_weights_share_out_as_many_rows_as_there_were():
    # 10 rows at 1 : 1 are 5 each: 5/8 of an epoch and 2.5 epochs
    counts, verdict = appearances({"weights": {"a": 1, "b": 1}})
    assert counts == [5, 5]
    assert verdict.notes == {"epochs": {"a": 0.625, "b": 2.5}}
    assert sorted(verdict.times[8:]) == [2, 3]


def test_a_source_without_a_weight_is_left_out():
    assert appearances({"weights": {"a": 1}, "rows": 8})[0] == [8, 0]


def test_temperature():
    # sizes 8 and 2 under T = 2: sqrt 2.828 to 1.414, 2 to 1, of 9 rows 6 and 3
    assert appearances({"temperature": 2, "rows": 9})[0] == [6, 3]
    assert appearances({"temperature": 1})[0] == [8, 2]


def test_epochs():
    assert appearances({"epochs": {"a": 0.5, "b": 3}})[0] == [4, 6]
    assert appearances({"epochs": {"b": 1.5}})[0] == [8, 3]


def test_no_row_more_often_than_max_epochs():
    counts, verdict = appearances({"weights": {"a": 1, "b": 1}, "rows": 100, "max_epochs": 2})
    assert counts == [16, 4]
    assert verdict.notes["held at max_epochs"] == ["a", "b"]


def test_the_test_split_is_left_alone():
    columns = {"_split": np.array(["test", *["train"] * 8, "test"])}
    _, verdict = appearances({"epochs": {"a": 2, "b": 0}}, columns=columns)
    assert verdict.times.tolist() == [1, *[2] * 7, 0, 1]
    assert verdict.code.tolist() == [*[-1] * 8, 0, -1]


def test_shards_change_nothing_and_the_seed_does():
    config = {"weights": {"a": 1, "b": 1}}
    times = appearances(config)[1].times
    assert (times == appearances(config, cut=3)[1].times).all()
    assert any((times != appearances(config, seed=s)[1].times).any() for s in (1, 2, 3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "one of weights, temperature and epochs; none given"),
        ({"weights": {"a": 1}, "temperature": 1}, "weights and temperature given"),
        ({"epochs": {"a": 1}, "rows": 3}, "epochs already say"),
        ({"weights": {"a": -1}}, "mix.weights.a is -1"),
        ({"weights": {"a": 0}}, "are all 0"),
    ],
)
def test_contradictions_are_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        MixStep(type="mix", **config)


def test_unknown_source():
    with pytest.raises(UserError, match="mix: there is no source 'aa'"):
        appearances({"weights": {"aa": 1}})


CAPPED_ROWS = [row(f"a{i}", source=0) for i in range(10)] + [row(f"b{i}", source=1) for i in range(4)]


def test_each_source_has_its_own_limit():
    verdict = decide(CapStep(type="cap", each=5, sources={"b": 2}), CAPPED_ROWS)
    left = kept(verdict)
    assert (sum(index < 10 for index in left), sum(index >= 10 for index in left)) == (5, 2)
    assert verdict.reasons == [OVER]


def test_rows_that_are_dropped_already_do_not_count():
    alive = [index % 2 == 0 for index in range(14)]
    verdict = decide(CapStep(type="cap", each=4), CAPPED_ROWS, alive=alive)
    assert sum(alive[index] and index < 10 for index in kept(verdict)) == 4
    assert sum(alive[index] and index >= 10 for index in kept(verdict)) == 2


def test_the_seed_and_the_row_choose_not_the_order():
    config = CapStep(type="cap", each=5)
    chosen = {CAPPED_ROWS[index]["id"] for index in kept(decide(config, CAPPED_ROWS))}
    assert chosen == {CAPPED_ROWS[::-1][index]["id"] for index in kept(decide(config, CAPPED_ROWS[::-1], cut=3))}
    assert chosen != {CAPPED_ROWS[index]["id"] for index in kept(decide(config, CAPPED_ROWS, seed=1))}


def test_unknown_source_and_empty_cap():
    with pytest.raises(UserError, match=r"cap.sources: there is no source 'bb'.*Did you mean 'b'"):
        decide(CapStep(type="cap", sources={"bb": 2}), CAPPED_ROWS)
    with pytest.raises(ValidationError, match="cap needs `each`"):
        CapStep(type="cap")
    with pytest.raises(ValidationError, match="'a' is capped at 0"):
        CapStep(type="cap", sources={"a": 0})
