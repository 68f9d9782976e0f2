"""Scores of stored responses, and the responses about which two scores disagree."""

from __future__ import annotations

import pytest

from align.config.validation import validate_plain
from align.config.verifiers import EnvironmentVerifier
from align.data.final_answers import split_thought
from align.evaluation.rescoring import Rescored, StoredResponse, compare, rescore, stored_scores
from align.scoring.score import Part, WeightedSum
from align.scoring.verifiers import open_verifier


def responses(*texts: str) -> list[StoredResponse]:
    return [StoredResponse({"id": text, "answer": "4", "prompt": []}, split_thought(text), "1") for text in texts]


def verifier(kind: str) -> Part:
    return Part(kind, 1.0, open_verifier(validate_plain(EnvironmentVerifier, {kind: "answer"}), "score"))


def test_reasons_have_the_name_of_their_reward_among_several() -> None:
    scored = rescore("both", WeightedSum((verifier("number"), verifier("exact"))), responses("it is 4", "4", "5"))
    assert scored.scores == [1.0, 2.0, 0.0]
    assert scored.reasons == ["exact_unequal", "", "number_unequal, exact_unequal"]
    assert scored.parts == {"number": [1.0, 1.0, 0.0], "exact": [0.0, 1.0, 0.0]}
    single = rescore("number", WeightedSum((verifier("number"),)), responses("4 or 5"))
    assert (single.reasons, single.summary()["reasons"]) == (["no_answer"], {"no_answer": 1})


def test_thoughts_are_not_scored() -> None:
    assert rescore("n", WeightedSum((verifier("number"),)), responses("<think>4</think>5")).scores == [0.0]


def test_disagreements_are_ordered_by_distance() -> None:
    agreement = compare(Rescored("a", [0.0, 1.0, 0.4, 0.5], [""] * 4), Rescored("b", [0.1, 0.0, 0.6, 1.0], [""] * 4))
    # Distances: 0.1, 1, 0.2, 0.5.
    assert (agreement.compared, agreement.disagreements) == (4, [1, 3])


def test_scores_of_other_ranges_are_scaled() -> None:
    agreement = compare(Rescored("a", [-2.0, 2.0, 1.0], [""] * 3), Rescored("b", [0.0, 1.0, 0.0], [""] * 3))
    # -2, 2, 1 are 0, 1, 0.75 of their range.
    assert agreement.disagreements == [2]


def test_rank_correlation_averages_the_ranks_of_ties() -> None:
    agreement = compare(Rescored("a", [0.0, 0.0, 1.0], [""] * 3), Rescored("b", [0.1, 0.2, 0.3], [""] * 3))
    # Ranks 0.5, 0.5, 2 and 0, 1, 2: covariance 1.5, squares 1.5 and 2; 1.5 / sqrt(3) = 0.866.
    assert agreement.correlation == pytest.approx(0.8660254)
    assert compare(Rescored("a", [1.0, 1.0], [""] * 2), Rescored("b", [0.1, 0.2], [""] * 2)).correlation is None


def test_responses_without_a_stored_score_are_not_compared() -> None:
    data = responses("4", "5")
    assert stored_scores(data) is None
    stored = Rescored("stored", [1.0, None], ["", ""])
    assert compare(Rescored("a", [0.0, 1.0], ["", ""]), stored).compared == 1
    assert stored.summary()["responses"] == 1
