"""Accuracies of a reward model on held-out pairs, counted by hand."""

from align.evaluation.pairs import pair_accuracy, score_pairs


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
    found = pair_accuracy(rows, [2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    # as labelled: right, wrong, right, tie = wrong; the reward model is right about the flipped one
    assert found["as_labelled"]["value"] == 0.5
    assert found["true"]["value"] == 2 / 3
    assert found["true"]["n"] == 3
    assert found["labels_true"]["value"] == 2 / 3
    assert found["longer"]["value"] == (1 + 0 + 0.5 + 1) / 4
    assert found["ties"] == 1
    assert found["by_source"]["a"]["n"] == 2


def test_without_gold_scores_there_is_no_true_accuracy():
    found = pair_accuracy([pair("a", "b")], [1.0], [0.0])
    assert found["true"] is None


def test_both_sides_are_scored_against_their_own_prompt():
    seen: list[tuple[list, list[str], list[bool], list[str | None]]] = []

    def score(prompts: list, responses: list[str], finished: list[bool], tools: list[str | None]) -> list[float]:
        seen.append((prompts, responses, finished, tools))
        return [float(len(text)) for text in responses]

    found = score_pairs([pair("aaa", "b"), {**pair("c", "dd"), "rejected_finished": False, "tools": "[]"}], score)
    assert seen[0][1] == ["aaa", "c", "b", "dd"]
    assert len(seen[0][0]) == 4
    assert seen[0][2] == [True, True, True, False]
    assert seen[0][3] == [None, "[]", None, "[]"]
    assert found["as_labelled"]["value"] == 0.5
