"""Bounds of gates: every spelling, round trips, and what is refused with which remedy."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from align.config.stages.evaluation.gates import ALIASES, Bound, parse_bound

SYSTEMS = ["sft", "sft-2", "ppo", "best_8"]

names = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,20}", fullmatch=True)
sizes = st.floats(min_value=0, max_value=1e300, allow_nan=False)
operators = st.sampled_from([">=", "<=", ">", "<"])


@st.composite
def bounds(draw: st.DrawFn) -> tuple[Bound, list[str]]:
    """Any bound, and systems that include the one it names."""
    systems = draw(st.lists(names, max_size=4))
    operator = draw(operators)
    if draw(st.booleans()):
        return Bound(operator, number=draw(st.floats(allow_nan=False, allow_infinity=False))), systems
    system = draw(st.one_of(names, st.sampled_from(ALIASES)))
    arithmetic = draw(st.sampled_from([None, "+", "-", "*"]))
    number = 0.0 if arithmetic is None else draw(sizes)
    return Bound(operator, system, arithmetic, number), [*systems, system]


@given(bounds())
def test_what_a_bound_spells_is_read_back_as_that_bound(draws):
    bound, systems = draws
    assert parse_bound(str(bound), systems, "gates.x") == bound


@given(bounds(), st.text(" \t", max_size=3))
def test_space_around_the_parts_changes_nothing(draws, space):
    bound, systems = draws
    operator, right = bound.operator, bound.right
    assert parse_bound(f"{space}{operator}{space}{right}{space}", systems, "gates.x") == bound


@given(st.text(max_size=30))
def test_any_text_is_a_bound_or_an_error_with_its_place(text):
    try:
        bound = parse_bound(text, SYSTEMS, "gates.gold")
    except ValueError as error:
        assert str(error).startswith("gates.gold: ")
    else:
        assert parse_bound(str(bound), SYSTEMS, "gates.gold") == bound


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_exactly_one_of_opposite_bounds_is_kept(value, number):
    assert Bound(">=").is_satisfied(value, number) != Bound("<").is_satisfied(value, number)
    assert Bound("<=").is_satisfied(value, number) != Bound(">").is_satisfied(value, number)
    assume(abs(value - number) > 1e-3)
    assert Bound(">").is_satisfied(value, number) == (value > number)
    assert Bound("<=").is_satisfied(value, number) == (value < number)


def test_a_step_that_rounds_badly_is_still_kept():
    bound = parse_bound(">= sft - 0.1", SYSTEMS, "gates.x")
    assert 0.8 - 0.1 != 0.7  # floats
    assert bound.is_satisfied(0.7, bound.value(0.8))
    assert not Bound(">").is_satisfied(0.7, 0.8 - 0.1)


@pytest.mark.parametrize(
    ("text", "alternative", "number"),
    [
        (">= 0.3", 9.0, 0.3),
        ("<=-2.5e-1", 9.0, -0.25),
        ("> .5", 9.0, 0.5),
        (">= sft", 2.0, 2.0),
        (">= sft - 0.5", 2.0, 1.5),
        (">= sft-0.5", 2.0, 1.5),
        ("<= base * 1.05", 2.0, 2.1),
        ("< reference+1e-1", 2.0, 2.1),
    ],
)
def test_values(text, alternative, number):
    assert parse_bound(text, SYSTEMS, "gates.x").value(alternative) == pytest.approx(number)


def test_name_with_dash_and_digits_is_a_name_if_it_exists():
    assert parse_bound(">= sft-2", SYSTEMS, "") == Bound(">=", "sft-2")
    assert parse_bound(">= sft - 2", SYSTEMS, "") == Bound(">=", "sft", "-", 2.0)
    assert parse_bound(">= ppo-2", SYSTEMS, "") == Bound(">=", "ppo", "-", 2.0)
    assert parse_bound(">= sft-2 - 0.1", SYSTEMS, "") == Bound(">=", "sft-2", "-", 0.1)


@pytest.mark.parametrize(
    "text",
    [
        "0.3",
        "== 0.3",
        "at least 0.3",
        ">=",
        ">= sfft - 0.02",
        ">= pp0",
        ">= 30%",
        ">= sft / 2",
        ">= sft - 0.02 - 0.01",
        ">= sft - -0.02",
        ">= 0,3",
        ">= nan",
        ">= 1e999",
        ">= sft * 1e999",
    ],
)
def test_what_is_refused(refused, text):
    refused(parse_bound, text, SYSTEMS, "gates.gold")
