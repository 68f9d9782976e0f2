"""Pairs of several answers: by score and by rank, with margins, caps, ties and equal texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.recipe.step_settings import PairsStep
from align.data.rows import Dropped, Row, assistant, user
from align.data.steps.pairs import Answers, make_pairs
from align.data.steps.step import StepContext, start_step
from tests.support.refusals import Refused


def made(row: Row, kind: str = "preferences", seed: int = 0, **settings: Any) -> Row | Dropped | list[Row]:
    context = StepContext(kind, seed, Path(), Path())
    (result,) = start_step(PairsStep(type="pairs", **settings), context).apply([row])
    return result


def pairs(row: Row, **settings: Any) -> list[str]:
    """Pairs as ``better>worse``."""
    actual = made(row, **settings)
    assert isinstance(actual, list), actual
    return [f"{entry['chosen'][0]['content']}>{entry['rejected'][0]['content']}" for entry in actual]


def row(*responses: dict[str, Any], **more: Any) -> Row:
    return {
        "id": "r", "source": "s", "prompt": [user("q")], "checks": "c", "_where": "f:1",
        "responses": list(responses), **more,
    }  # fmt: skip


def scored(*values: float | None) -> Row:
    """Answers a, b, c with these scores."""
    return row(*({"content": "abcdef"[index], "score": value, "rank": None} for index, value in enumerate(values)))


def ranked(*places: int | None) -> Row:
    return row(*({"content": "abcdef"[index], "score": None, "rank": place} for index, place in enumerate(places)))


def test_ways_to_compare() -> None:
    four = scored(2, 1, 4, 3)
    assert pairs(four) == ["c>b"]
    assert pairs(four, how="all") == ["a>b", "c>a", "d>a", "c>b", "d>b", "c>d"]
    assert pairs(four, how="adjacent") == ["c>d", "d>a", "a>b"]
    by_seed = {pairs(four, how="best_random", seed=seed)[0] for seed in range(30)}
    assert by_seed == {"c>a", "c>b", "c>d"}
    assert pairs(four, how="best_random", seed=5) == pairs(four, how="best_random", seed=5)
    # A random rejected answer is one that is worse, not one that ties.
    assert {pairs(scored(4, 4, 4, 1), how="best_random", seed=seed)[0] for seed in range(20)} == {"a>d"}


def test_ranks_count_from_the_best() -> None:
    assert pairs(ranked(1, 0, 2)) == ["b>c"]
    assert pairs(ranked(1, 0, 2), how="adjacent") == ["b>a", "a>c"]
    assert pairs(ranked(0, 0, 1), how="all") == ["a>c", "b>c"]
    actual = made(ranked(1, 0))
    assert isinstance(actual, list) and "chosen_score" not in actual[0]
    # Answers without a rank are not compared, and a score says more than a rank.
    assert pairs(ranked(None, 1, 0), how="all") == ["c>b"]
    both = row({"content": "a", "score": 1.0, "rank": 0}, {"content": "b", "score": 2.0, "rank": 1})
    assert pairs(both) == ["b>a"]


def test_a_pair_has_all_that_a_row_needs() -> None:
    cut = row({"content": "a", "score": 1.0, "finished": False}, {"content": "b", "score": 0.0}, tools="[]", score=3.0)
    assert made(cut) == [
        {
            "id": "r-0-1", "source": "s", "prompt": [user("q")], "checks": "c", "_where": "f:1", "tools": "[]",
            "chosen": [assistant("a")], "rejected": [assistant("b")], "chosen_score": 1.0, "rejected_score": 0.0,
            "chosen_finished": False,
        }
    ]  # fmt: skip


def test_margins_and_the_most_pairs_of_a_prompt() -> None:
    four = scored(1, 2, 4, 4.5)
    assert set(pairs(four, how="all", margin=2.5)) == {"c>a", "d>a", "d>b"}
    assert pairs(four, how="all", max_per_prompt=2) == ["d>a", "c>a"]
    assert set(pairs(ranked(0, 1, 2), how="all", margin=2)) == {"a>c"}
    assert made(four, margin=4) == Dropped("answers nearer than the margin", {"scores": [1.0, 2.0, 4.0, 4.5]})
    lone = scored(5, 4, 1)
    assert {pairs(lone, how="best_random", margin=2, seed=seed)[0] for seed in range(20)} == {"a>c"}


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (scored(1, 1), "answers tie"),
        (scored(1, None), "fewer than two answers with a score or a rank"),
        (
            row({"content": "a", "score": 2.0}, {"content": " ", "score": 1.0}),
            "fewer than two answers with a score or a rank",
        ),
        (row({"content": "a", "score": 2.0}, {"content": "a ", "score": 1.0}), "answers are the same"),
        ({"id": "r", "prompt": [user("q")]}, "no answers to compare"),
    ],
)
def test_rows_that_make_no_pair(inputs: Row, reason: str) -> None:
    actual = made(inputs)
    assert isinstance(actual, Dropped) and actual.reason == reason


def test_equal_texts_are_left_out_of_the_pairs_of_others() -> None:
    same = row(*({"content": text, "score": float(index)} for index, text in enumerate(("a", "b", "b "))))
    assert pairs(same, how="all") == ["b>a", "b >a"]


def test_existing_pairs_stay_unless_scores_tie() -> None:
    pair = {"id": "r", "prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert made(pair) is pair
    assert made(pair | {"chosen_score": 2.0, "rejected_score": 1.0}, margin=1) == pair | {
        "chosen_score": 2.0, "rejected_score": 1.0
    }  # fmt: skip
    tie = {"chosen_score": 1.0, "rejected_score": 1.0}
    assert made(pair | tie) == Dropped("scores tie", tie)
    near = {"chosen_score": 1.0, "rejected_score": 0.5}
    assert made(pair | near, margin=1) == Dropped("scores nearer than the margin", near)
    against = pair | {"chosen_score": 0.0, "rejected_score": 1.0}
    assert made(against) is against  # a label may contradict a score on purpose
    assert isinstance(made(against, margin=0.1), Dropped)
    assert made(pair | {"rejected": [assistant("a")]}) == Dropped("chosen equals rejected")


def test_unpaired_data_gets_labels_and_none_that_contradict() -> None:
    actual = made(scored(3, 2, 1), "unpaired", how="all")
    assert isinstance(actual, list)
    assert [(entry["completion"], entry["label"]) for entry in actual] == [
        ([assistant("a")], True),
        ([assistant("c")], False),
    ]
    assert [entry["id"] for entry in actual] == ["r-0", "r-2"] and "responses" not in actual[0]
    labeled = {"id": "r", "prompt": [user("q")], "completion": [assistant("a")], "label": True}
    assert made(labeled, "unpaired") is labeled


def test_other_kinds_have_no_pairs(refused: Refused) -> None:
    refused(lambda: made(scored(1, 2), "instructions"))


def prompt_row(name: str = "r") -> dict:
    return {"id": name, "source": "s", "prompt": [user("hi")], "checks": "c"}


def test_best_against_worst() -> None:
    pairs, counts = make_pairs(
        [prompt_row()], [["a", "b", "c", " "]], [[0.5, 1.0, 0.0, 9.0]], "best_worst", noise=0.0, seed=0
    )
    assert len(pairs) == 1
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": "b"}]
    assert pairs[0]["rejected"] == [{"role": "assistant", "content": "c"}]
    assert (pairs[0]["chosen_score"], pairs[0]["rejected_score"], pairs[0]["flipped"]) == (1.0, 0.0, False)
    assert counts == {
        "prompts": 1, "empty_responses": 1, "prompts_too_few": 0, "compared": 1, "identical": 0, "tied": 0, "pairs": 1,
        "flipped": 0,
    }  # fmt: skip


def test_ties_identical_texts_and_too_few() -> None:
    rows = [prompt_row("tied"), prompt_row("same"), prompt_row("few")]
    responses, scores = [["a", "b"], ["a", "a "], ["a", ""]], [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    pairs, counts = make_pairs(rows, responses, scores, "best_worst", noise=0.0, seed=0)
    assert pairs == []
    assert (counts["tied"], counts["identical"], counts["prompts_too_few"]) == (1, 1, 1)


def test_all_pairs_add_up() -> None:
    # Scores 0, 1, 1, 2 of texts a, b, c, c: six comparisons; b-c ties, c-c is identical, four are left.
    pairs, counts = make_pairs([prompt_row()], [["a", "b", "c", "c"]], [[0.0, 1.0, 1.0, 2.0]], "all", noise=0.0, seed=0)
    assert (counts["compared"], counts["tied"], counts["identical"], counts["pairs"]) == (6, 1, 1, 4)
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    assert len({pair["id"] for pair in pairs}) == 4


def test_noise_flips_labels_and_keeps_true_scores() -> None:
    rows = [prompt_row(str(i)) for i in range(2000)]
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
    pairs, _ = make_pairs(
        [prompt_row()], [["good", "bad"]], [[1.0, 0.0]], "all", noise=0.0, seed=0, finished=[[True, False]]
    )
    assert (pairs[0]["chosen_finished"], pairs[0]["rejected_finished"]) == (True, False)
    swapped, _ = make_pairs(
        [prompt_row()], [["bad", "good"]], [[0.0, 1.0]], "all", noise=0.0, seed=0, finished=[[True, False]]
    )
    assert (swapped[0]["chosen_finished"], swapped[0]["rejected_finished"]) == (False, True)


def test_bad_arguments(refused: Refused) -> None:
    refused(lambda: make_pairs([prompt_row()], [["a"]], [[1.0]], "all", noise=1.0, seed=0))
    refused(lambda: make_pairs([prompt_row()], [["a", "b"]], [[1.0, float("nan")]], "all", noise=0.0, seed=0))
    refused(lambda: make_pairs([prompt_row()], [["a", "b"]], [[1.0, 0.0]], "some", noise=0.0, seed=0))


def test_make_pairs_of_several_messages_with_tools() -> None:
    def episode(text: str) -> Answers:
        turns = [assistant("look"), {"role": "tool", "content": text}, assistant(text)]
        return Answers([{**turns[0], "train": False}, *turns[1:]], turns)

    answers = [[episode("good"), episode("bad")]]
    prompt = prompt_row() | {"tools": "[{}]"}
    options = {"noise": 0.0, "seed": 0, "answers": answers}
    (pair,), _ = make_pairs([prompt], [["good", "bad"]], [[1.0, 0.0]], "best_worst", **options)
    assert pair["chosen"] == answers[0][0].chosen and pair["rejected"] == answers[0][1].rejected
    assert pair["tools"] == "[{}]"
    # Where noise swaps the sides, each has the form of the side on which it stands.
    options |= {"noise": 0.99}
    (flipped,), _ = make_pairs([prompt], [["good", "bad"]], [[1.0, 0.0]], "best_worst", **options)
    assert flipped["flipped"] and flipped["chosen"] == answers[0][1].chosen
