"""Caps: no source has more rows than it may, and the seed chooses them."""

import pytest
from pydantic import ValidationError

from align.config.recipe.step_settings import CapStep
from align.data.steps.cap import OVER
from align.errors import UserError
from tests.support.data.steps.tables import decide, kept, row

ROWS = [row(f"a{i}", source=0) for i in range(10)] + [row(f"b{i}", source=1) for i in range(4)]


def test_each_source_has_its_own_limit():
    verdict = decide(CapStep(type="cap", each=5, sources={"b": 2}), ROWS)
    left = kept(verdict)
    assert (sum(index < 10 for index in left), sum(index >= 10 for index in left)) == (5, 2)
    assert verdict.reasons == [OVER]


def test_rows_that_are_dropped_already_do_not_count():
    alive = [index % 2 == 0 for index in range(14)]
    verdict = decide(CapStep(type="cap", each=4), ROWS, alive=alive)
    assert sum(alive[index] and index < 10 for index in kept(verdict)) == 4
    assert sum(alive[index] and index >= 10 for index in kept(verdict)) == 2


def test_the_seed_and_the_row_choose_not_the_order():
    config = CapStep(type="cap", each=5)
    chosen = {ROWS[index]["id"] for index in kept(decide(config, ROWS))}
    assert chosen == {ROWS[::-1][index]["id"] for index in kept(decide(config, ROWS[::-1], cut=3))}
    assert chosen != {ROWS[index]["id"] for index in kept(decide(config, ROWS, seed=1))}


def test_unknown_source_and_empty_cap():
    with pytest.raises(UserError, match=r"cap.sources: there is no source 'bb'.*Did you mean 'b'"):
        decide(CapStep(type="cap", sources={"bb": 2}), ROWS)
    with pytest.raises(ValidationError, match="cap needs `each`"):
        CapStep(type="cap")
    with pytest.raises(ValidationError, match="'a' is capped at 0"):
        CapStep(type="cap", sources={"a": 0})
