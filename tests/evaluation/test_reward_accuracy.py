"""A reward model on held-out pairs: counted by hand, and on scores whose faults are known."""

import json
import math

import numpy as np
import pytest

from align.evaluation.reward_accuracy import (
    agreement,
    pair_accuracy,
    pair_report,
    pair_reports,
    read_sides,
    score_sides,
)


def pair(chosen: str, rejected: str, source: str = "a", gold: tuple[float, float] | None = None) -> dict:
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "source": source,
    }
    return row if gold is None else row | {"chosen_score": gold[0], "rejected_score": gold[1]}


def test_counts_by_hand():
    rows = [
        pair("long one", "short", gold=(1.0, 0.0)),
        pair("a", "bb", gold=(0.0, 1.0)),  # a flipped label
        pair("aa", "bb", "b", gold=(0.5, 0.5)),  # gold cannot tell: not in `true`
        pair("aaa", "b", "b", gold=(1.0, 0.0)),
    ]
    accuracies = pair_accuracy(rows, [2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    # as labeled: right, wrong, right, tie = wrong; the reward model is right about the flipped one
    assert accuracies["as_labeled"]["value"] == 0.5
    assert accuracies["true"]["value"] == 2 / 3
    assert accuracies["true"]["n"] == 3
    assert accuracies["labels_true"]["value"] == 2 / 3
    assert accuracies["longer"]["value"] == (1 + 0 + 0.5 + 1) / 4
    assert accuracies["ties"] == 1
    assert accuracies["by_source"]["a"]["n"] == 2


def test_without_gold_scores_there_is_no_true_accuracy():
    accuracies = pair_accuracy([pair("a", "b")], [1.0], [0.0])
    assert accuracies["true"] is None


def test_both_sides_are_scored_against_their_own_prompt():
    calls: list[tuple[list, list[str], list[bool], list[str | None]]] = []

    def score(prompts: list, responses: list[str], finished: list[bool], tools: list[str | None]) -> list[float]:
        calls.append((prompts, responses, finished, tools))
        return [float(len(text)) for text in responses]

    rows = [pair("aaa", "b"), {**pair("c", "dd"), "rejected_finished": False, "tools": "[]"}]
    chosen, rejected = score_sides(read_sides(rows), score)
    assert calls[0][1] == ["aaa", "c", "b", "dd"]
    assert len(calls[0][0]) == 4
    assert calls[0][2] == [True, True, True, False]
    assert calls[0][3] == [None, "[]", None, "[]"]
    assert (chosen, rejected) == ([3.0, 1.0], [1.0, 2.0])


def test_last_turn_of_episode_is_scored_after_earlier_turns():
    turns = [
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "x"},
    ]
    row = pair("a", "b") | {"chosen": turns}
    prompts, texts, *_ = read_sides([row])
    assert prompts == [[*row["prompt"], *turns[:2]], row["prompt"]]
    assert texts == ["x", "b"]


def many(n: int, seed: int = 0, gold: bool = False) -> tuple[list[dict], np.ndarray]:
    """Pairs of random lengths, and those lengths."""
    g = np.random.default_rng(seed)
    lengths = g.integers(1, 60, size=(n, 2))
    rows = []
    for index, (first, second) in enumerate(lengths.tolist()):
        golds = (float(index % 9), 4.0) if gold else None
        rows.append(pair("x" * first, "y" * second, gold=golds))
    return rows, lengths


def test_a_report_is_json_with_n_and_interval_everywhere():
    rows, _ = many(50)
    g = np.random.default_rng(1)
    scores = (g.normal(1, 1, 50).tolist(), g.normal(0, 1, 50).tolist())
    report = pair_report(rows, scores, seed=0, second=("other", scores))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    estimates = [
        report["as_labeled"],
        report["margin"],
        report["shorter_chosen"],
        report["length_correlation"],
        report["length_margin_correlation"],
        report["calibration"]["ece"],
        report["calibration"]["temperature"],
        report["calibration"]["ece_scaled"],
        *(report["agreement"][name] for name in ("accuracy", "kappa", "spearman")),
        *(entry["accuracy"] for entry in report["by_margin"]),
    ]
    for entry in estimates:
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["n"] > 0
    plain = pair_accuracy(rows, *scores)
    assert report["margin"]["value"] == pytest.approx(plain.pop("margin"))
    assert plain.items() <= report.items()


def test_accuracy_by_the_models_own_margin():
    # 100 pairs whose margins are 1 to 100; wrong are those below 20, and every second one from 20 to 39
    sizes = np.arange(1, 101)
    wrong = (sizes < 20) | ((sizes < 40) & (sizes % 2 == 0))
    rows, _ = many(100)
    report = pair_report(rows, (np.where(wrong, -sizes, sizes).tolist(), [0.0] * 100), seed=0)
    assert report["by_margin_of"] == "model"
    assert [entry["n"] for entry in report["by_margin"]] == [20] * 5
    # bins end at 20.8, 40.6 and so on; of 21 to 40 the even ones below 40 are wrong
    assert [entry["accuracy"]["value"] for entry in report["by_margin"]] == [0.0, 0.55, 1.0, 1.0, 1.0]
    assert report["by_margin"][0]["low"] == 1
    assert report["by_margin"][-1]["high"] == 100
    assert [entry["high"] for entry in report["by_margin"][:-1]] == [entry["low"] for entry in report["by_margin"][1:]]


def test_accuracy_by_gold_margin_is_against_gold():
    rows, _ = many(90, gold=True)  # gold margins -4 to 4, ten of each; nothing is said of the ten ties
    gold = np.array([row["chosen_score"] - row["rejected_score"] for row in rows])
    proxy = np.where(np.abs(gold) == 1, -gold, gold)  # wrong where the answers are close
    report = pair_report(rows, (proxy.tolist(), [0.0] * 90), seed=0)
    assert report["by_margin_of"] == "gold"
    assert sum(entry["n"] for entry in report["by_margin"]) == 80
    shown = [(entry["low"], entry["n"], entry["accuracy"]["value"]) for entry in report["by_margin"]]
    assert shown == [(1, 20, 0), (1.75, 20, 1), (2.5, 20, 1), (3.25, 20, 1)]


def test_equal_margins_and_few_pairs_make_fewer_bins():
    rows, _ = many(100)
    equal = pair_report(rows, ([1.0] * 100, [0.0] * 100), seed=0)["by_margin"]
    assert [(entry["low"], entry["high"], entry["n"]) for entry in equal] == [(1, 1, 100)]
    few = pair_report(rows[:39], (list(range(1, 40)), [0.0] * 39), seed=0)["by_margin"]
    assert [entry["n"] for entry in few] == [39]


def test_a_model_that_pays_for_length_is_found_out():
    rows, lengths = many(300)
    g = np.random.default_rng(2)
    prompts = g.normal(0, 100, size=(300, 1))  # scores of different prompts cannot be compared
    scores = prompts + lengths + g.normal(0, 5, size=(300, 2))
    report = pair_report(rows, (scores[:, 0].tolist(), scores[:, 1].tolist()), seed=0)
    assert report["length_margin_correlation"]["value"] > 0.9
    assert report["length_margin_correlation"]["low"] > 0.85
    assert abs(report["length_correlation"]["value"]) < 0.4
    shorter = lengths[:, 0] < lengths[:, 1]
    assert report["shorter_chosen"]["n"] == shorter.sum()
    assert report["shorter_chosen"]["value"] < 0.2
    fair = g.normal(size=(300, 2))
    unbiased = pair_report(rows, (fair[:, 0].tolist(), fair[:, 1].tolist()), seed=0)
    assert unbiased["length_correlation"]["low"] < 0 < unbiased["length_correlation"]["high"]


def test_a_score_that_is_the_length():
    rows, lengths = many(300)
    report = pair_report(rows, (lengths[:, 0].tolist(), lengths[:, 1].tolist()), seed=0)
    assert report["length_correlation"]["value"] == pytest.approx(1)
    assert report["length_margin_correlation"]["value"] == pytest.approx(1)
    assert report["shorter_chosen"]["value"] == 0
    assert len(report["by_margin"]) == 5


def test_a_tie_is_wrong_also_where_the_shorter_answer_is_chosen():
    rows = [pair("a", "bb"), pair("a", "bb"), pair("aa", "b"), pair("a", "b")]
    report = pair_report(rows, ([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]), seed=0)
    assert (report["shorter_chosen"]["value"], report["shorter_chosen"]["n"]) == (0.5, 2)


def test_pairs_of_one_length_have_no_shorter_answer():
    report = pair_report([pair("a", "b")] * 5, ([1.0] * 5, [0.0] * 5), seed=0)
    assert report["shorter_chosen"] is None
    assert report["length_correlation"]["value"] is None


def test_agreement_by_hand():
    first = ([1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 0.0])  # right, right, wrong, wrong, tie
    second = ([2.0, 0.0, 0.0, 3.0, 1.0], [0.0, 1.0, 5.0, 1.0, 1.0])  # right, wrong, wrong, right, tie
    agreed_share = agreement(first, second, seed=0)
    assert agreed_share["accuracy"]["value"] == 3 / 5
    # chance: 2/5 * 2/5 + 2/5 * 2/5 + 1/5 * 1/5 = 9/25; (15/25 - 9/25) / (16/25)
    assert agreed_share["kappa"]["value"] == pytest.approx(6 / 16)
    # ranks of 1 1 -1 -1 0: 4.5 4.5 1.5 1.5 3; of 2 -1 -5 2 0: 4.5 2 1 4.5 3
    assert agreed_share["spearman"]["value"] == pytest.approx(
        np.corrcoef([4.5, 4.5, 1.5, 1.5, 3], [4.5, 2, 1, 4.5, 3])[0, 1]
    )


def test_two_reward_models_are_each_others_second_scorer():
    rows, _ = many(30)
    g = np.random.default_rng(3)
    left, right = ((g.normal(1, 1, 30).tolist(), g.normal(0, 1, 30).tolist()) for _ in range(2))
    first, second = pair_reports(rows, [("reward", left), ("reward-b", right)], seed=0, task="pairs")
    assert (first["stage"], first["task"], first["agreement"]["other"]) == ("reward", "pairs", "reward-b")
    assert (second["stage"], second["agreement"]["other"]) == ("reward-b", "reward")
    assert first["agreement"]["spearman"]["value"] == pytest.approx(second["agreement"]["spearman"]["value"])
    assert first["as_labeled"] != second["as_labeled"]
    [alone] = pair_reports(rows, [("reward", left)], seed=0, task="pairs")
    assert alone["agreement"] is None


@pytest.mark.parametrize("gold", [False, True])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_wrong_and_json_able(broken, gold):
    rows, _ = many(50, gold=gold)
    g = np.random.default_rng(1)
    chosen, rejected = g.normal(1, 1, 50).tolist(), g.normal(0, 1, 50).tolist()
    chosen[0], chosen[1], rejected[1] = math.nan, broken, broken
    report = pair_report(rows, (chosen, rejected), seed=0, second=("other", (rejected, chosen)))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    intact = pair_report(rows[2:], (chosen[2:], rejected[2:]), seed=0)
    assert report["as_labeled"]["n"] == 50
    assert report["as_labeled"]["value"] * 50 == pytest.approx(intact["as_labeled"]["value"] * 48)
    assert report["agreement"]["accuracy"]["n"] == report["calibration"]["n"] == 48
    assert gold or report["by_margin"] == intact["by_margin"]


def test_no_pairs_are_no_error():
    report = pair_report([], ([], []), seed=0)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["pairs"], report["calibration"], report["by_margin"]) == (0, None, [])
