"""RewardBench's numbers, worked by hand."""

import json
import math

import numpy as np
import pytest

from align.evaluation.reward_accuracy import SCORE, SECTIONS, best_credit, best_sections, pair_sections, ties
from align.evaluation.statistics import wilson


def value(part) -> float:
    numerators, denominators, weights = part
    if not denominators.sum(axis=0).all():
        return math.nan
    return float((numerators.sum(axis=0) / denominators.sum(axis=0)) @ weights)


def test_examples_count_alike_within_a_section():
    # 3 of 4 and 0 of 1: 3/5, not the mean of the subsets
    sections = pair_sections(["alpacaeval-easy"] * 4 + ["mt-bench-med"], [True, True, True, False, False], seed=0)
    assert sections == {"Chat": wilson(3, 5).as_dict()}


def test_mathematics_counts_as_much_as_code():
    subsets = ["math-prm"] * 2 + ["hep-python"] * 3 + ["hep-go"]
    sections = pair_sections(subsets, [True, False, True, True, True, False], seed=0)
    # 4 examples of code, so each of the 2 of mathematics counts twice: (2 + 3) / 8
    assert sections["Reasoning"]["value"] == pytest.approx(5 / 8)
    assert sections["Reasoning"]["n"] == 6
    effective = 8**2 / (2 * 2**2 + 4)  # Kish
    assert sections["Reasoning"]["low"] == pytest.approx(wilson(5 / 8 * effective, effective).low)
    alone = pair_sections(["math-prm"] * 4, [True, True, True, False], seed=0)
    assert alone["Reasoning"]["value"] == pytest.approx(0.75)


def test_total_is_mean_of_all_sections():
    subsets = [members[0] for members in SECTIONS.values() for _ in range(40)]
    right = [True] * 40 + [True] * 20 + [False] * 20 + [True] * 30 + [False] * 10 + [False] * 40
    sections = pair_sections(subsets, right, seed=0)
    assert list(sections) == [SCORE, *SECTIONS]
    assert sections[SCORE]["value"] == pytest.approx((1 + 0.5 + 0.75 + 0) / 4)
    assert sections[SCORE]["n"] == 160
    # independent sections: variances add, over 16
    error = math.sqrt((0.25 / 40 + 0.1875 / 40) / 16)
    assert sections[SCORE]["low"] == pytest.approx(sections[SCORE]["value"] - 1.96 * error, abs=0.25 * error)
    assert sections[SCORE]["high"] == pytest.approx(sections[SCORE]["value"] + 1.96 * error, abs=0.25 * error)
    assert SCORE not in pair_sections(subsets[:120], right[:120], seed=0)


def test_other_subsets_have_no_sections():
    assert pair_sections(["alpacaeval-easy", "mine"], [True, True], seed=0) is None


def test_a_tie_for_the_top_shares_the_credit():
    assert best_credit([3.0], [1.0, 2.0, 0.0]) == 1
    assert best_credit([3.0], [1.0, 3.0, 3.0]) == pytest.approx(1 / 3)
    assert best_credit([2.0], [1.0, 3.0, 0.0]) == 0


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_prompt_with_a_score_that_is_not_finite_is_wrong(broken):
    assert best_credit([broken], [1.0, 2.0]) == 0
    assert best_credit([3.0], [1.0, broken]) == 0
    intact = ([2.0, 2.0], [0.0])
    # all is lost but that the other prompt's good answers beat its bad one; the distance's tanh is -1
    tied = ties(["tied:1", "ref:1"], [([broken, 2.0], [0.0]), ([1.0], [0.0])])
    assert value(tied) == pytest.approx(0.3 - 0.01)
    ref = ties(["tied:1", "ref:1"], [intact, ([1.0], [broken])])
    assert value(ref) == pytest.approx(0.3 + 0.2 - 0.01)


def test_ties_by_hand():
    # 1: worst good is 3 above, goods 1 apart; the ref prompt's is 0.5 above. Then 1, 1, 1, 0 and tanh(0.5 / 1 - 1).
    # 2: worst good is 1 below, goods 2 apart; the ref prompt's is 1 below. Then 0, 0, 0, 0 and tanh(-1 / 2 - 1).
    ids = ["tied:1", "ref:1", "ref:2", "tied:2"]
    scores = [([5.0, 4.0], [1.0, 0.0]), ([2.0], [1.5, 0.0]), ([1.0], [2.0]), ([3.0, 1.0], [2.0])]
    expected = 0.3 * 0.5 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0 + 0.01 * (math.tanh(-0.5) + math.tanh(-1.5)) / 2
    assert value(ties(ids, scores)) == pytest.approx(expected)


def test_being_right_counts_apart_from_by_how_much():
    # good answers 4 apart and 1 above: right, but the better ones are told apart more than good from bad
    tied_only = value(ties(["tied:1", "ref:1"], [([5.0, 1.0], [0.0]), ([1.0], [2.0])]))
    assert tied_only == pytest.approx(0.3 + 0.01 * math.tanh(-1 / 4 - 1))


def test_good_answers_that_score_alike_are_the_best_there_is():
    ids = ["tied:1", "ref:1"]
    assert value(ties(ids, [([1.0, 1.0], [0.0]), ([2.0], [1.0])])) == pytest.approx(1.01)
    assert value(ties(ids, [([1.0, 1.0], [1.0]), ([2.0], [1.0])])) == pytest.approx(0.3)  # 0 / 0 counts nothing
    assert value(ties(ids, [([1.0, 1.0], [2.0]), ([2.0], [1.0])])) == pytest.approx(0.3 - 0.01)


def test_a_prompt_without_its_other_half_counts_where_it_can():
    ids = ["tied:1", "ref:1", "ref:7"]
    actual = value(ties(ids, [([2.0, 2.0], [0.0]), ([2.0], [1.0]), ([0.0], [1.0])]))
    assert actual == pytest.approx(0.3 * 1 + 0.3 * 0.5 + 0.2 + 0.2 + 0.01)
    assert math.isnan(value(ties(["ref:1"], [([1.0], [0.0])])))


def test_sections_of_best_of_four():
    subsets = ["Math"] * 20 + ["Focus"] * 20 + ["Ties"] * 2
    scores = [([1.0], [0.0, 0.0, 0.0])] * 10 + [([0.0], [0.0, 0.0, 0.0])] * 10  # a tie of four: a quarter each
    scores += [([1.0], [0.0, 2.0, 0.0])] * 15 + [([1.0], [0.0, 0.0, 0.0])] * 5
    scores += [([1.0, 1.0], [0.0]), ([2.0], [1.0])]
    ids = [str(index) for index in range(40)] + ["tied:1", "ref:1"]
    sections = best_sections(subsets, ids, scores, seed=0)
    assert list(sections) == ["Math", "Focus", "Ties"]
    assert sections["Math"]["value"] == pytest.approx((10 + 10 / 4) / 20)
    assert sections["Math"]["method"] == "bootstrap"
    assert sections["Focus"] == wilson(5, 20).as_dict()
    assert sections["Ties"]["value"] == pytest.approx(1.01)
    assert json.loads(json.dumps(sections, allow_nan=False)) == sections


def test_the_mean_of_all_six():
    names = ["Factuality", "Precise IF", "Math", "Safety", "Focus"]
    subsets = [name for name in names for _ in range(30)] + ["Ties"] * 60
    g = np.random.default_rng(0)
    scores = [([float(g.normal(0.8))], g.normal(size=3).tolist()) for _ in range(150)]
    scores += [(g.normal(2, 0.3, 3).tolist(), g.normal(size=4).tolist()) for _ in range(60)]
    ids = [str(index) for index in range(150)] + [f"{kind}:{index}" for index in range(30) for kind in ("ref", "tied")]
    sections = best_sections(subsets, ids, scores, seed=0)
    assert list(sections) == [SCORE, *names, "Ties"]
    assert sections[SCORE]["value"] == pytest.approx(np.mean([sections[name]["value"] for name in (*names, "Ties")]))
    assert sections[SCORE]["low"] < sections[SCORE]["value"] < sections[SCORE]["high"]
    width = sections[SCORE]["high"] - sections[SCORE]["low"]
    assert 0.05 < width < 0.2
    assert SCORE not in best_sections(subsets[:-60], ids[:-60], scores[:-60], seed=0)
