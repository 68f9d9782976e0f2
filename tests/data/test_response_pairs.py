"""Pairs from scored responses."""

from __future__ import annotations

import pytest

from align.data.response_pairs import Answers, make_pairs
from align.data.rows import assistant, user


def row(name: str = "r") -> dict:
    return {"id": name, "source": "s", "prompt": [user("hi")], "checks": "c"}


def test_best_against_worst() -> None:
    pairs, counts = make_pairs([row()], [["a", "b", "c", " "]], [[0.5, 1.0, 0.0, 9.0]], "best_worst", noise=0.0, seed=0)
    assert len(pairs) == 1
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": "b"}]
    assert pairs[0]["rejected"] == [{"role": "assistant", "content": "c"}]
    assert (pairs[0]["chosen_score"], pairs[0]["rejected_score"], pairs[0]["flipped"]) == (1.0, 0.0, False)
    assert counts == {
        "prompts": 1, "empty_responses": 1, "prompts_too_few": 0, "compared": 1, "identical": 0, "tied": 0, "pairs": 1,
        "flipped": 0,
    }  # fmt: skip


def test_ties_identical_texts_and_too_few() -> None:
    rows = [row("tied"), row("same"), row("few")]
    responses, scores = [["a", "b"], ["a", "a "], ["a", ""]], [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    pairs, counts = make_pairs(rows, responses, scores, "best_worst", noise=0.0, seed=0)
    assert pairs == []
    assert (counts["tied"], counts["identical"], counts["prompts_too_few"]) == (1, 1, 1)


def test_all_pairs_add_up() -> None:
    # Scores 0, 1, 1, 2 of texts a, b, c, c: six comparisons; b-c ties, c-c is identical, four are left.
    pairs, counts = make_pairs([row()], [["a", "b", "c", "c"]], [[0.0, 1.0, 1.0, 2.0]], "all", noise=0.0, seed=0)
    assert (counts["compared"], counts["tied"], counts["identical"], counts["pairs"]) == (6, 1, 1, 4)
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    assert len({pair["id"] for pair in pairs}) == 4


def test_noise_flips_labels_and_keeps_true_scores() -> None:
    rows = [row(str(i)) for i in range(2000)]
    pairs, counts = make_pairs(rows, [["good", "bad"]] * 2000, [[1.0, 0.0]] * 2000, "best_worst", noise=0.1, seed=3)
    flipped = [pair for pair in pairs if pair["flipped"]]
    assert counts["flipped"] == len(flipped) and 150 < len(flipped) < 250  # 200 ± 3.7 standard deviations
    assert all(p["chosen"][0]["content"] == "bad" and p["chosen_score"] < p["rejected_score"] for p in flipped)
    # A pair's draw does not depend on its neighbors.
    again, _ = make_pairs(rows[::-1], [["good", "bad"]] * 2000, [[1.0, 0.0]] * 2000, "best_worst", noise=0.1, seed=3)
    assert {p["id"] for p in again if p["flipped"]} == {p["id"] for p in flipped}
    reseeded, _ = make_pairs(rows, [["good", "bad"]] * 2000, [[1.0, 0.0]] * 2000, "best_worst", noise=0.1, seed=4)
    assert {p["id"] for p in reseeded if p["flipped"]} != {p["id"] for p in flipped}


def test_a_cut_response_keeps_its_mark() -> None:
    pairs, _ = make_pairs([row()], [["good", "bad"]], [[1.0, 0.0]], "all", noise=0.0, seed=0, finished=[[True, False]])
    assert (pairs[0]["chosen_finished"], pairs[0]["rejected_finished"]) == (True, False)
    swapped, _ = make_pairs(
        [row()], [["bad", "good"]], [[0.0, 1.0]], "all", noise=0.0, seed=0, finished=[[True, False]]
    )
    assert (swapped[0]["chosen_finished"], swapped[0]["rejected_finished"]) == (False, True)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="noise"):
        make_pairs([row()], [["a"]], [[1.0]], "all", noise=1.0, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        make_pairs([row()], [["a", "b"]], [[1.0, float("nan")]], "all", noise=0.0, seed=0)
    with pytest.raises(ValueError, match="expected best_worst, all"):
        make_pairs([row()], [["a", "b"]], [[1.0, 0.0]], "some", noise=0.0, seed=0)  # type: ignore[arg-type]


def test_answers_of_several_messages_and_the_tools_of_their_prompt() -> None:
    def episode(text: str) -> Answers:
        turns = [assistant("look"), {"role": "tool", "content": text}, assistant(text)]
        return Answers([{**turns[0], "train": False}, *turns[1:]], turns)

    answers = [[episode("good"), episode("bad")]]
    prompt = row() | {"tools": "[{}]"}
    options = {"noise": 0.0, "seed": 0, "answers": answers}
    (pair,), _ = make_pairs([prompt], [["good", "bad"]], [[1.0, 0.0]], "best_worst", **options)
    assert pair["chosen"] == answers[0][0].chosen and pair["rejected"] == answers[0][1].rejected
    assert pair["tools"] == "[{}]"
    # Where noise swaps the sides, each has the form of the side on which it stands.
    options |= {"noise": 0.99}
    (flipped,), _ = make_pairs([prompt], [["good", "bad"]], [[1.0, 0.0]], "best_worst", **options)
    assert flipped["flipped"] and flipped["chosen"] == answers[0][1].chosen
